"""The page for people in a real browser, by key, click and touch: what is seen is what is kept.

Needs Debian's chromium and chromium-driver, and selenium; skipped elsewhere.
"""

import json
import time

import pytest
from pages import Page, request
from test_label import SHOWING, pairs, records, serving

from nanorlhf.people.label import LabelConfig

KEYS = dict(left="1", right="2", tie="3", skip="s", undo="u") | {"both bad": "4"}


@pytest.fixture
def cfg(tmp_path):
    return LabelConfig(out=str(tmp_path / "labels.jsonl"), policy="P", annotator="anna")


class LabelPage(Page):
    def open(self, port):
        self.driver.get(f"http://127.0.0.1:{port}/")
        self.wait("0 of ", "1 of ", "2 of ", "4 of ", "10 of ")

    def shown(self):
        return tuple(map(self.text, ("prompt", "left", "right")))

    def button(self, choice):
        return self.driver.find_element("css selector", f'button[value="{choice}"]')

    def press(self, key):
        time.sleep(0.6)  # as a person may: sooner it would be taken for a double click
        self.actions().send_keys(key).perform()

    def click(self, choice):
        time.sleep(0.6)
        self.button(choice).click()


@pytest.fixture
def browser(window):
    return LabelPage(window)


@pytest.fixture
def phone(phone_window):
    return LabelPage(phone_window)


def test_ten_pairs_by_key_and_by_click_are_the_records_of_what_was_seen(cfg, browser):
    choices = ["left", "right", "tie", "both bad", "skip"] * 2
    with serving(cfg, pairs(10)) as port:
        browser.open(port)
        seen = []
        for i, choice in enumerate(choices):
            seen.append((*browser.shown(), choice))
            browser.press(KEYS[choice]) if i < 5 else browser.click(choice)
            browser.wait(f"{i + 1} of 10 done")
        assert browser.text("prompt") == "Every pair has a label. Thank you."
        assert not browser.driver.find_element("id", "pair").is_displayed()
        browser.press("u")
        browser.wait("9 of 10 done")
        assert browser.shown() == seen[-1][:3]
        browser.driver.refresh()
        browser.wait("9 of 10 done")
        assert browser.shown() == seen[-1][:3]
    found = records(cfg)
    assert len(found) == 11 and found.pop()["choice"] == "undo"
    for (prompt, left, right, choice), record in zip(seen, found, strict=True):
        position = record["position"]
        texts = record["first"].strip(), record["second"].strip()
        assert prompt == record["prompt"].strip()
        assert (left, right) == (texts if position == "first" else texts[::-1])
        wins = dict(left=left, right=right).get(choice)
        assert record.get("chosen", "").strip() == (wins or "")
        assert wins or record["choice"] == choice
        assert 0.5 < record["seconds"] < 20


def test_a_double_click_a_held_key_and_a_double_tap_are_one_choice(cfg, browser):
    with serving(cfg, pairs(9)) as port:
        browser.open(port)
        time.sleep(0.6)
        browser.actions().double_click(browser.button("left")).perform()
        browser.wait("1 of 9 done")
        browser.press("333")
        browser.wait("2 of 9 done")
        time.sleep(0.6)
        browser.run("""for (const repeat of [true, true])
            document.dispatchEvent(new KeyboardEvent("keydown", {key: "1", repeat}))""")
        browser.run("for (let i = 0; i < 5; i++) document.querySelector('[value=right]').click()")
        browser.wait("3 of 9 done")
        time.sleep(0.3)
        assert browser.text("progress").startswith("3 of 9 done") and len(records(cfg)) == 3


def test_keys_that_the_browser_uses_are_left_to_it(cfg, browser):
    from selenium.webdriver import Keys

    with serving(cfg, pairs(4)) as port:
        browser.open(port)
        for held in Keys.CONTROL, Keys.ALT, Keys.META:
            time.sleep(0.6)
            browser.actions().key_down(held).send_keys("1").key_up(held).perform()
        for key in Keys.ENTER, Keys.SPACE, "5", "a", Keys.ARROW_DOWN:
            browser.press(key)
        assert records(cfg) == []
        browser.click("left")
        browser.wait("1 of 4 done")
        assert browser.run("return document.activeElement.tagName") == "BODY"
        browser.press(Keys.SPACE)  # scrolls, and does not press the button again
        browser.press("S")
        browser.wait("2 of 4 done")
        assert [r["choice"] for r in records(cfg)][1:] == ["skip"]


def test_two_windows_make_one_label_of_one_pair(cfg, browser):
    with serving(cfg, pairs(4)) as port:
        browser.open(port)
        first = browser.driver.current_window_handle
        browser.driver.switch_to.new_window("tab")
        browser.open(port)
        browser.press("1")
        browser.wait("1 of 4 done")
        second = browser.driver.current_window_handle
        browser.driver.switch_to.window(first)
        browser.wait("1 of 4 done")  # which it has learnt by itself
        browser.run("[state, since] = [arguments[0], 0]", dict(showing=SHOWING))  # as before
        browser.press("2")
        browser.wait("1 of 4 done")
        assert browser.text("prompt") == "prompt 1"
        browser.press("2")
        browser.wait("2 of 4 done")
        browser.driver.switch_to.window(second)
        browser.wait("2 of 4 done")  # which it has learnt by itself
        browser.driver.close()
        browser.driver.switch_to.window(first)
    assert [r["showing"][15:16] for r in records(cfg)] == ["0", "1"]


def test_a_program_that_is_gone_is_said_and_the_window_goes_on_with_the_next(cfg, browser):
    with serving(cfg, pairs(4)) as port:
        browser.open(port)
        browser.press("1")
        browser.wait("1 of 4 done")
    browser.press("2")
    browser.wait("The program does not answer. Start it again", name="note")
    assert browser.text("prompt") == "prompt 1" and len(records(cfg)) == 1
    with serving(cfg, pairs(4), port):
        browser.press("2")
        browser.wait("2 of 4 done")
        assert browser.text("note") == ""
    with serving(cfg, [dict(pair, id="f" * 16) for pair in pairs(1)], port):  # other pairs
        browser.press("2")
        browser.wait("expected a choice between answers that were shown here", name="note")
    assert [r["choice"] == r["position"] for r in records(cfg)] == [True, False]


def test_text_of_a_model_is_text(cfg, browser):
    hostile = dict(
        prompt="</p></main><title>taken</title><script>document.title = 'taken'</script>",
        first="<img src=x onerror=\"document.title = 'taken'\"> &amp; <b>x</b>\n\n  and \u2028 so",
        second="\u202e</script><style>* { display: none }</style> \u05e9\u05dc\u05d5\u05dd \u0007",
    )
    with serving(cfg, pairs(2, **hostile)) as port:
        browser.open(port)
        state = json.loads(request(port, "GET", "/state")[1])
        time.sleep(0.3)
        assert browser.driver.title == "Which answer is better?"
        assert browser.shown() == tuple(state[side].strip() for side in ("prompt", "left", "right"))
        assert browser.run("return document.querySelectorAll('main *').length") == 8
        assert browser.button("undo").is_displayed() and browser.button("undo").text == "uundo"
        names = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert names and all(name.startswith(f"http://127.0.0.1:{port}/") for name in names)
        browser.press("1")
        browser.wait("1 of 2 done")
    assert records(cfg)[0]["chosen"] == state["left"]


def test_on_a_phone_the_answers_are_stacked_and_nothing_is_wider_than_the_window(cfg, phone):
    long = dict(first="x" * 500 + " and so on" * 200)
    with serving(cfg, pairs(3, **long)) as port:
        phone.open(port)
        where = "return document.getElementById(arguments[0]).parentNode.getBoundingClientRect()"
        left, right = phone.run(where, "left"), phone.run(where, "right")
        assert right["top"] >= left["bottom"] and right["left"] == left["left"]
        wide = "return [document.documentElement.scrollWidth, innerWidth, innerHeight]"
        scroll_width, width, height = phone.run(wide)
        assert scroll_width <= width == 360
        for choice in KEYS:  # within reach of a thumb, wherever the text is scrolled to
            box = phone.run("return arguments[0].getBoundingClientRect()", phone.button(choice))
            assert box["height"] >= 44 and box["width"] >= 44
            assert 0 <= box["left"] and box["right"] <= width and box["bottom"] <= height
        phone.run("scrollTo(0, 1e6)")
        assert phone.run("return scrollY") > 100
        phone.click("right")
        phone.wait("1 of 3 done")
        assert phone.run("return scrollY") == 0  # the next pair is read from its beginning
    assert len(records(cfg)) == 1


def test_wide_the_answers_stand_side_by_side(cfg, browser):
    cfg.against = "Q"
    with serving(cfg, pairs(3)) as port:
        browser.open(port)
        where = "return document.getElementById(arguments[0]).parentNode.getBoundingClientRect()"
        left, right = browser.run(where, "left"), browser.run(where, "right")
        assert left["right"] < right["left"] and left["top"] == right["top"]
        assert left["width"] == pytest.approx(right["width"], abs=1)
        assert "P" not in browser.run("return document.body.innerText")  # nor Q: no name
        browser.press("3")
        browser.wait("The last pair: 1 was by", name="note")
