"""The page for talking in a real browser: what is shown, kept and sent while an answer comes.

Needs Debian's chromium and chromium-driver, and selenium; skipped elsewhere.
"""

import socketserver
import threading
import time

import pages
import pytest
from pages import ROOT, Page
from test_chat import models as folder  # noqa: F401  a fixture

from nanorlhf.people.chat import HELP, Chat, ChatConfig
from nanorlhf.people.page import Handler
from nanorlhf.support import UserError

HOSTILE = "</p><script>document.title = 'x'</script><img src=x onerror=\"document.title = 'x'\">"


class Fake:
    """Answers word by word what a test tells it to; gate: a semaphore that each word waits for."""

    def __init__(self, *answers):
        self.answers, self.asked, self.gate, self.stopped = list(answers), [], None, 0

    def __call__(self, models, turns):
        self.asked.append((models, turns))
        answer = self.answers.pop(0) if self.answers else "Well, well."
        try:
            for model in models:
                for i, word in enumerate(answer.split(" ")):
                    if word == "FAIL":
                        raise UserError("expected something else")
                    if self.gate:
                        self.gate.acquire(timeout=20)
                    yield dict(model=model, token=i, text=" " + word)
                yield dict(model=model, text="", last=True)
        except GeneratorExit:
            self.stopped += 1
            raise


def serving(say, port=0):
    html = ROOT / "nanorlhf/people/chat.html"
    state = dict(model="out/ppo", help=HELP)
    return pages.serving(html, {"GET /state": lambda: state, "POST /say": say}, port)


class ChatPage(Page):
    def open(self, port):
        self.driver.get(f"http://127.0.0.1:{port}/")
        self.wait("out/ppo", name="model")

    def all(self, selector):
        """The text of each of these."""
        found = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.run(found, selector)

    def write(self, text):
        box = self.driver.find_element("id", "message")
        box.clear()
        box.send_keys(text)

    def say(self, text):
        self.write(text + "\n")

    def whole(self, *answers):
        """Until these are the answers, and the last of them is whole."""
        self.until(lambda: self.all("article .text") == [*answers] and self.run(
            "return control === null"), lambda: self.all("article .text"))  # fmt: skip

    def click(self, name, n=-1):
        self.driver.find_elements("css selector", f"button.{name}")[n].click()


@pytest.fixture
def browser(window):
    return ChatPage(window)


@pytest.fixture
def phone(phone_window):
    return ChatPage(phone_window)


def test_turns_are_shown_and_sent_with_the_tokens_of_their_answers(browser):
    fake = Fake("One two three.", "Four.")
    with serving(fake) as port:
        browser.open(port)
        browser.say("Hello?")
        browser.whole("One two three.")
        browser.write("And")
        browser.driver.find_element("id", "send").click()
        browser.whole("One two three.", "Four.")
        assert browser.all(".message .text") == ["Hello?", "And"]
        browser.say("  ")
    first, second = (dict(message=message, answers={}) for message in ("Hello?", "And"))
    answered = dict(first, answers={"out/ppo": [0, 1, 2]})
    assert fake.asked == [(["out/ppo"], [first]), (["out/ppo"], [answered, second])]


def test_an_answer_that_comes_byte_by_byte_is_whole(browser, monkeypatch):
    class Dribble:
        def __init__(self, file):
            self.file, self.flush, self.close, self.closed = file, file.flush, file.close, False

        def write(self, data):
            for i in range(len(data)):
                self.file.write(data[i : i + 1])
                time.sleep(0.001)

    def setup(handler):
        socketserver.StreamRequestHandler.setup(handler)
        if fake is not None:
            handler.wfile = Dribble(handler.wfile)

    fake = None
    monkeypatch.setattr(Handler, "setup", setup)
    monkeypatch.setattr(Handler, "disable_nagle_algorithm", True)
    answer = "\u6f22\u5b57 \U0001f642 \u00e9t\u00e9\u2028x \U0001f469\u200d\U0001f52c"
    with serving(lambda **fields: fake(**fields)) as port:
        browser.open(port)
        fake = Fake(answer)
        browser.say("Say it.")
        browser.whole(answer)


def test_words_are_shown_as_they_come_and_stop_keeps_them(browser):
    fake = Fake("One two three four five.", "Six.")
    fake.gate = threading.Semaphore(2)
    with serving(fake) as port:
        browser.open(port)
        browser.say("Count.")
        browser.until(lambda: browser.all("article .text") == ["One two"])
        assert not browser.driver.find_element("id", "send").is_displayed()
        browser.say("ignored while it answers")
        browser.driver.find_element("id", "stop").click()
        browser.whole("One two")
        assert browser.all("section .note") == ["Stopped."]
        fake.gate.release(10)
        browser.until(lambda: fake.stopped == 1)  # the program has noticed
        fake.gate = None
        browser.say("On.")
        browser.whole("One two", "Six.")
    assert fake.asked[1][1][0]["answers"] == {"out/ppo": [0, 1]}
    assert len(fake.asked) == 2


def test_escape_stops_too(browser):
    from selenium.webdriver import Keys

    fake = Fake("One two three.")
    fake.gate = threading.Semaphore(1)
    with serving(fake) as port:
        browser.open(port)
        browser.say("Count.")
        browser.until(lambda: browser.all("article .text") == ["One"])
        browser.actions().send_keys(Keys.ESCAPE).perform()
        browser.whole("One")
        fake.gate.release(10)


def test_a_message_that_is_edited_starts_again_from_there(browser):
    from selenium.webdriver import Keys

    fake = Fake("1", "2", "3", "4")
    with serving(fake) as port:
        browser.open(port)
        for n, message in enumerate(["a", "b", "c"], 1):
            browser.say(message)
            browser.whole(*"123"[:n])
        browser.click("edit", 1)
        assert browser.run("return document.getElementById('message').value") == "b"
        assert len(browser.all("section.later")) == 2
        browser.actions().send_keys(Keys.ESCAPE).perform()  # thought better of it
        assert browser.all("section.later") == [] and browser.all("article .text") == [*"123"]
        browser.click("edit", 1)
        browser.say("")  # the same without such a key
        assert browser.all("section.later") == [] and browser.all("article .text") == [*"123"]
        browser.click("edit", 1)
        browser.actions().send_keys("B\n").perform()
        browser.whole("1", "4")
        assert browser.all(".message .text") == ["a", "bB"]
    assert [turn["message"] for turn in fake.asked[-1][1]] == ["a", "bB"]


def test_an_answer_that_is_asked_for_again_replaces_it_and_what_follows(browser):
    fake = Fake("1", "2", "3")
    with serving(fake) as port:
        browser.open(port)
        browser.say("a")
        browser.whole("1")
        browser.say("b")
        browser.whole("1", "2")
        browser.click("again", 0)
        browser.whole("3")
        assert browser.all(".message .text") == ["a"]
    assert fake.asked[-1] == (["out/ppo"], [dict(message="a", answers={})])


def test_commands(browser):
    fake = Fake("1", "2", "3")
    with serving(fake) as port:
        browser.open(port)
        browser.say("/help")
        assert browser.text("note") == HELP
        browser.say("/compare out/sft")
        browser.wait("Answers come from out/ppo and out/sft.", name="note")
        browser.say("a")
        browser.whole("1", "1")
        assert browser.all("article h2") == ["out/ppo", "out/sft"]
        browser.say("/compare")
        browser.say("b")
        browser.whole("1", "1", "2")
        browser.say("/reset")
        assert browser.all("section") == []
        browser.say("c")
        browser.whole("3")
    assert [names for names, _ in fake.asked] == [["out/ppo", "out/sft"], ["out/ppo"], ["out/ppo"]]
    assert fake.asked[1][1][0]["answers"] == {"out/ppo": [0], "out/sft": [0]}
    assert len(fake.asked[2][1]) == 1


def test_a_reader_at_the_end_follows_and_one_who_has_scrolled_up_is_left_there(browser):
    fake = Fake("word " * 400, "more " * 800)
    with serving(fake) as port:
        browser.open(port)
        browser.say("Long.")
        browser.until(lambda: browser.run("return control === null"))
        end = "return [scrollY, document.documentElement.scrollHeight - innerHeight]"
        at, last = browser.run(end)
        assert at >= last - 2 and last > 100
        fake.gate = threading.Semaphore(20)
        browser.say("More.")
        browser.until(lambda: len(browser.all("article")) == 2)
        browser.run("scrollTo(0, 50)")
        fake.gate.release(2000)
        browser.until(lambda: browser.run("return control === null"))
        at, more = browser.run(end)
        assert at == 50 and more > last + 100


def test_what_goes_wrong_is_text_and_one_may_ask_again(browser):
    fake = Fake("One FAIL", "Two.", f"{HOSTILE}")
    with serving(fake) as port:
        browser.open(port)
        browser.say(HOSTILE)
        browser.whole("One")
        assert browser.all("section .error") == ["expected something else"]
        browser.click("again")
        browser.whole("Two.")
        browser.say("b")
        browser.whole("Two.", HOSTILE)
        assert browser.all(".message .text")[0] == HOSTILE
        assert browser.driver.title == "Talk with a model"
        assert browser.run("return document.querySelectorAll('img, main script').length") == 0
        names = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert names and all(name.startswith(f"http://127.0.0.1:{port}/") for name in names)
    browser.say("Still there?")
    browser.until(lambda: browser.all("section .error") == ["The program does not answer."])


def test_an_answer_that_breaks_off_is_said(browser, monkeypatch):
    monkeypatch.setattr("nanorlhf.people.page.streamed", lambda events: iter(list(events)[:1]))
    with serving(Fake("One two.")) as port:
        browser.open(port)
        browser.say("Count.")
        browser.whole("One")
        assert browser.all("section .error") == ["The answer broke off."]


def test_a_model_answers_and_goes_on(browser, folder):  # noqa: F811
    chat, name = Chat(ChatConfig(max_new_tokens=12, device="cpu"), "cpu"), str(folder / "hh")
    talker = chat.talker(name)
    with serving(chat.answers) as port:
        browser.open(port)
        browser.run("models = [arguments[0]]", name)
        browser.say("Hi.")
        browser.until(lambda: browser.run("return control === null && turns.length == 1"))
        tokens = browser.run("return turns[0].answers[arguments[0]]", name)
        browser.say("So?")
        browser.until(lambda: browser.run("return control === null && turns.length == 2"))
    context, _ = talker.context([("Hi.", tokens), ("So?", [])])
    assert talker.read[: len(context)] == context and browser.all("section .error") == []


def test_on_a_phone_nothing_is_wider_than_the_window(phone):
    with serving(Fake("x" * 500, "y")) as port:
        phone.open(port)
        phone.say("w" * 300)
        phone.whole("x" * 500)
        width, inner = phone.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert width <= inner == 360
        for name in "send", "message":
            box = phone.run("return document.getElementById(arguments[0]).getBoundingClientRect()",
                            name)  # fmt: skip
            assert box["height"] >= 44 and 0 <= box["left"] and box["right"] <= 360
            assert box["bottom"] <= 640
