"""Talking with a model: what it reads, what it answers, what stays in the cache; over HTTP, and in
a terminal. The page itself is tested in test_chat_browser.py."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pages
import pytest
import torch
from pages import ENVIRONMENT, ROOT, STRANGERS, request

from nanorlhf import environment, tokenizer
from nanorlhf.generate import generate, generate_texts
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.people import chat as chat_module
from nanorlhf.people.chat import Chat, ChatConfig, Talker, form_of, truncate
from nanorlhf.support import UserError, config

HH = {"chosen": "\n\nHuman: Hi.\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi.\n\nAssistant: No"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained models: a and b of the built-in world, hh of conversations, long of many tokens."""
    folder, tok = tmp_path_factory.mktemp("models"), tokenizer.learn(environment.prompts(50), 300)
    (folder / "hh.jsonl").write_text(json.dumps(HH))
    for seed, name in enumerate(["a", "b", "hh", "long"]):
        torch.manual_seed(seed)
        shape = GPTConfig(tok.vocab_size, 4000 if name == "long" else 96, 2, 2, 16)
        model = GPT(shape)
        with torch.no_grad():
            for w in model.parameters():
                w.mul_(1.5)  # or it would say the same token for ever
        model.save(folder / name, tok)
        files = [str(folder / "hh.jsonl")] if name == "hh" else []
        (folder / name / "settings.json").write_text(json.dumps(dict(data=files)))
    return folder


def made(models, name, **settings):
    settings = dict(max_new_tokens=12, device="cpu") | settings
    return Talker(str(models / name), ChatConfig(**settings), "cpu")


def said(talker, turns, seed=0):
    """-> tokens of the answer, all its text, notes"""
    rng = torch.Generator().manual_seed(seed)
    uniforms = 1 - torch.rand(1, talker.cfg.max_new_tokens, dtype=torch.float64, generator=rng)
    events = list(talker.answer(turns, uniforms))
    text = "".join(e.get("text", "") for e in events)
    return ([e["token"] for e in events if "token" in e], text,
            [e["note"] for e in events if "note" in e])  # fmt: skip


def fresh(talker, tokens):
    """The logits after these tokens, without a cache."""
    with torch.no_grad():
        return talker.model(torch.tensor([tokens]))[:, -1]


# --- the first turn is what generate gives ---


def test_greedy_is_what_generate_gives(models):
    talker = made(models, "a", temperature=0, max_new_tokens=30)
    prompt = environment.prompts(1)[0]
    tokens, prompt_len, mask = generate(talker.model, [talker.tok.encode(prompt)], 30, 0,
                                        talker.tok.eos, talker.tok.pad)  # fmt: skip
    response = tokens[0, prompt_len[0] : prompt_len[0] + mask.sum()].tolist()
    assert said(talker, [(prompt.strip(), [])])[0] == response and len({*response}) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_seed_gives_what_it_gives_to_generate(models, temperature):
    cfg = ChatConfig(seed=5, temperature=temperature, max_new_tokens=30, device="cpu")
    chat, name, prompt = Chat(cfg, "cpu"), str(models / "a"), environment.prompts(1)[0]
    talker = chat.talker(name)
    wanted = generate_texts(talker.model, talker.tok, [talker.tok.encode(prompt)], 30, temperature,
                            seed=5)[0][1]  # fmt: skip
    turn = dict(message=prompt.strip(), answers={})
    found = "".join(e.get("text", "") for e in chat.answers([name], [turn]))
    assert found == wanted and len(found) > 10
    again = "".join(e.get("text", "") for e in chat.answers([name], [turn]))
    assert again != wanted  # asked again, the numbers are new ones


# --- the cache ---


def reads(talker, monkeypatch):
    """How many tokens each pass computes, from now on."""
    found, forward = [], talker.model.transformer.forward
    counted = lambda tokens, *a: found.append(tokens.numel()) or forward(tokens, *a)  # noqa: E731
    monkeypatch.setattr(talker.model.transformer, "forward", counted)
    return found


def test_a_second_turn_reads_its_own_tokens_alone_and_has_the_logits_of_the_whole(
    models, monkeypatch
):
    talker = made(models, "hh")
    first, _, _ = said(talker, [("Hello.", [])])
    tokens, old = talker.context([("Hello.", first), ("And you?", [])])
    new, found = len(tokens) - len(talker.read), reads(talker, monkeypatch)
    logits = talker.logits(tokens)
    own = len(talker.tok.encode("\n\nHuman: And you?\n\nAssistant:"))
    assert found == [new] and old == 0 and own <= new <= own + 1  # its last choice was not read
    for token in [3, 60, 7]:
        assert torch.allclose(logits, fresh(talker, tokens), rtol=0, atol=1e-4)
        tokens = [*tokens, token]
        logits = talker.logits(tokens)
    assert found[2::2] == [1, 1, 1]  # between those without a cache
    assert logits.std() > 0.1


def test_when_the_context_is_full_the_oldest_turns_go_and_the_rest_is_read_as_if_it_were_new(
    models,
):
    talker = made(models, "hh", temperature=0)
    turns = []
    for i in range(4):
        answer, _, notes = said(talker, [*turns, (f"Say {i}.", [])])
        turns.append((f"Say {i}.", answer))
    turns[-1] = turns[-1][0], []  # as when it was asked
    tokens, old = talker.context(turns)
    assert 0 < old < 4 and notes == [f"no longer in the context: the oldest turns, {old} of them"]
    assert tokens == made(models, "hh").context(turns[old:])[0]
    assert len(tokens) <= 96 - 12 < len(made(models, "hh", max_new_tokens=0).context(turns)[0])
    new = made(models, "hh")
    assert torch.allclose(talker.logits(tokens), new.logits(tokens), rtol=0, atol=1e-4)
    assert torch.allclose(new.logits(tokens), fresh(new, tokens), rtol=0, atol=1e-4)


def test_a_turn_that_is_changed_or_asked_again_is_read_as_if_it_were_new(models):
    talker, long = made(models, "hh"), [("One.", [5, 6, 7]), ("Two.", [8, 9]), ("Three.", [])]
    for turns in long, [("One.", [])], [("One.", [5, 6]), ("2", [])], [("Uno.", [])], long:
        tokens, _ = talker.context(turns)
        assert torch.allclose(talker.logits(tokens), fresh(talker, tokens), rtol=0, atol=1e-4)
        assert talker.read == tokens
    assert torch.equal(talker.logits(tokens), talker.logits(tokens))  # only the last one again


def test_stopped_in_the_middle_of_a_pass_the_next_one_is_right(models, monkeypatch):
    talker = made(models, "hh")
    tokens, _ = talker.context([("One.", [5, 6, 7]), ("Two.", [])])
    talker.logits(tokens)
    with monkeypatch.context() as patch:
        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(talker.model.transformer.h[1], "forward", stop)  # the first layer has written
        with pytest.raises(KeyboardInterrupt):
            talker.logits([*tokens[:-9], *[9] * 9])
    assert torch.allclose(talker.logits(tokens), fresh(talker, tokens), rtol=0, atol=1e-4)


def test_weights_that_are_not_numbers_are_said(models):
    talker = made(models, "a")
    talker.model.transformer.ln_f.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not a finite number"):
        said(talker, [("x", [])])


# --- how turns become a prompt ---


def test_each_model_gets_the_prompts_that_it_was_trained_on(models, tmp_path):
    assert form_of(models / "a") == ("", "\n", False)
    assert all(prompt.endswith(".\n") for prompt in environment.prompts(20))
    assert form_of(models / "hh") == ("\n\nHuman: ", "\n\nAssistant:", True)
    assert form_of("gpt2") == form_of(tmp_path) == ("", "", True)
    for record, wanted in [
        ({"prompt": "Q: x\nA:", "response": " y"}, ("", "", False)),
        ({"prompt": "Q: x ->\n\n", "chosen": "y", "rejected": "z"}, ("", "\n\n", False)),
        ({"text": "A book."}, ("", "", True)),
        ({"messages": [dict(role="user", content="a"), dict(role="assistant", content="b")]},
         ("\n\nHuman: ", "\n\nAssistant:", True)),
    ]:  # fmt: skip
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        (tmp_path / "settings.json").write_text(json.dumps({"data": [str(tmp_path / "x.jsonl")]}))
        assert form_of(tmp_path) == wanted
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(UserError, match="expected --form, or the data of .*x.jsonl:1: "):
        form_of(tmp_path)
    forced = made(models, "a", form="conversation")
    assert (forced.before, forced.remembers) == ("\n\nHuman: ", True)


def test_a_conversation_is_the_text_that_such_models_are_trained_on(models):
    talker = made(models, "hh")
    encode, eos = talker.tok.encode, talker.tok.eos
    tokens, _ = talker.context([("Hi. ", [*encode(" Yes."), eos]), ("So?", [])])
    assert tokens == encode("\n\nHuman: Hi.\n\nAssistant: Yes.\n\nHuman: So?\n\nAssistant:")


def test_a_model_of_single_prompts_sees_the_last_message_alone(models):
    talker = made(models, "a")
    tokens, old = talker.context([("One.", [5, talker.tok.eos]), ("Two.", [])])
    assert (tokens, old) == (talker.tok.encode("Two.\n"), 0)
    plain = made(models, "a", form="text")  # goes on with a text, which may have ended
    tokens, _ = plain.context([("One", [5, plain.tok.eos]), ("Two", [])])
    assert tokens == [*plain.tok.encode("One"), 5, plain.tok.eos, *plain.tok.encode("Two")]
    assert plain.context([("", [])])[0] == [plain.tok.eos]


def test_a_message_that_is_too_long_is_refused(models):
    talker = made(models, "a")
    with pytest.raises(UserError, match="message of at most 84 tokens, came one of 1001"):
        talker.context([("7" * 1000, [])])


# --- what is sampled ---


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    left = lambda *settings: truncate(logits.clone(), *settings).isfinite()[0].tolist()  # noqa: E731
    assert left(1.0) == left(1.0, 9) == [True] * 4
    assert left(1.0, 1) == [False, True, False, False]
    assert left(1.0, 3) == [False, True, True, True]
    assert left(1.0, 0, 0.39) == left(1.0, 0, 0.001) == [False, True, False, False]
    assert left(1.0, 0, 0.41) == left(1.0, 0, 0.69) == [False, True, False, True]
    assert left(1.0, 0, 0.95) == [True] * 4
    assert left(1.0, 2, 0.58) == [False, True, False, True]  # 0.4 of the 0.7 that are left is 0.57
    assert left(1.0, 2, 0.56) == [False, True, False, False]
    assert left(0.1, 0, 0.9) == [False, True, False, False]  # 0.94 of the mass when it is so cold
    assert left(0, 1, 0.5) == [True] * 4  # and the likeliest is taken
    assert torch.equal(truncate(logits.clone(), 1.0), logits)
    kept = truncate(logits.clone(), 1.0, 2)
    assert torch.equal(kept[0, [1, 3]], logits[0, [1, 3]])


def test_with_one_token_to_choose_from_it_is_the_likeliest(models):
    turns = [("Write.", [])]
    greedy, _, _ = said(made(models, "a", temperature=0), turns)
    assert said(made(models, "a", top_k=1), turns)[0] == greedy
    assert said(made(models, "a", top_p=0.001), turns)[0] == greedy
    assert said(made(models, "a"), turns)[0] != greedy


TEXT = "a\u00e9\u6f22\U0001f642"


@pytest.mark.parametrize("data", [TEXT.encode(), b"\xff\xe6\xbca\xf0\x9f\x99", b"\x80" * 9])
def test_a_character_of_several_tokens_comes_when_it_is_whole(models, monkeypatch, data):
    talker = made(models, "a", temperature=0)
    tokens = [talker.tok.ranks[bytes([b])] for b in data] + [talker.tok.eos]
    script = iter(torch.eye(talker.tok.vocab_size)[tokens])
    monkeypatch.setattr(talker, "logits", lambda _: next(script)[None])
    texts = [e["text"] for e in talker.answer([("x", [])], torch.ones(1, 12))]
    assert "".join(texts) == talker.tok.decode(tokens) == data.decode(errors="replace")
    if data == TEXT.encode():
        assert [text for text in texts if text] == list(TEXT)


def test_two_models_get_the_same_numbers_and_remember_what_they_have_said(models):
    chat = Chat(ChatConfig(max_new_tokens=12, device="cpu", form="conversation"), "cpu")
    a, b = str(models / "a"), str(models / "b")
    turns = [dict(message="Hi.", answers={a: [5, 6]}), dict(message="So?", answers={})]
    events = list(chat.answers([a, b, a], turns))
    tokens = {name: [e["token"] for e in events if e["model"] == name and "token" in e]
              for name in (a, b)}  # fmt: skip
    n = len(tokens[a]) // 2
    assert tokens[a][:n] == tokens[a][n:] and tokens[a][:n] != tokens[b]
    known = [("Hi.", [5, 6]), ("So?", [])]
    assert chat.talkers[a].read[: -n + 1] == chat.talkers[a].context(known)[0]
    before = chat.talkers[b].read[: 1 - len(tokens[b])]  # it had not been there
    assert before == chat.talkers[b].context(known[1:])[0]


# --- over HTTP ---


@pytest.fixture
def page(models):
    """-> a function (method, path, fields) -> status, text"""
    cfg = ChatConfig(max_new_tokens=12, device="cpu")
    actions = {"GET /state": lambda: dict(model="m"), "POST /say": Chat(cfg, "cpu").answers}
    with pages.serving(ROOT / "nanorlhf/people/chat.html", actions) as port:
        ask = lambda *words, **headers: request(port, *words, **headers)  # noqa: E731
        ask.port = port
        yield ask


def fields(folder, **changes):
    turns = [dict(message="Write.", answers={})]
    return dict(models=[str(folder / "a")], turns=turns) | changes


def test_an_answer_comes_line_by_line_and_says_when_it_is_whole(models, page):
    status, text = page("POST", "/say", fields(models))
    *events, last = map(json.loads, text.splitlines())
    talker = made(models, "a", seed=1)
    assert status == 200 and last == {"done": True}
    assert [e["token"] for e in events if "token" in e] == said(talker, [("Write.", [])], seed=1)[0]
    assert {e["model"] for e in events} == {str(models / "a")}


@pytest.mark.parametrize("headers", STRANGERS)
def test_pages_of_others_may_not_ask(models, page, headers):
    headers = {name: value.format(port=page.port) for name, value in headers.items()}
    status, text = page("POST", "/say", fields(models), **headers)
    assert status == 403 and "token" not in text


@pytest.mark.parametrize("wrong, message", [
    (dict(models=["nowhere"]), "nowhere is no checkpoint"),
    (dict(models=7), "not iterable"),
    (dict(turns=[]), "not enough values"),
    (dict(turns=[dict(message="7" * 1000, answers={})]), "expected a message of at most 84 tokens"),
    (dict(turns=[dict(message=None, answers={})]), "NoneType"),
])  # fmt: skip
def test_what_goes_wrong_is_said_in_words(models, page, wrong, message):
    status, text = page("POST", "/say", fields(models, **wrong))
    assert status == 200 and message in json.loads(text)["error"]
    assert '"done"' in page("POST", "/say", fields(models))[1]  # and it goes on


@pytest.mark.parametrize("token", [-1, 10**6, "5", None, [5], 2.5])
def test_tokens_that_the_model_does_not_have_are_refused(models, page, token):
    asked = fields(models, models=[str(models / "hh")])
    asked["turns"].insert(0, dict(message="Hi.", answers={asked["models"][0]: [token]}))
    text = page("POST", "/say", asked)[1]
    assert "expected answers of this model" in json.loads(text)["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 4000, b"{}", b"null", b'{"models": []}'])
def test_a_body_that_is_no_question_is_refused(page, body):
    assert page("POST", "/say", body)[0] == 400


def test_a_reader_who_goes_away_stops_the_answer(models, capfd):
    chat = Chat(ChatConfig(max_new_tokens=3000, device="cpu", form="text"), "cpu")
    body = json.dumps(fields(models, models=[str(models / "long")])).encode()
    with pages.serving(None, {"POST /say": chat.answers}) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /say HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json"
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            while b'"token"' not in connection.recv(10000):
                pass
            assert chat.lock.locked()
        assert chat.lock.acquire(timeout=10)  # free for the next question
        assert len(chat.talkers[str(models / "long")].read) < 2900
    assert capfd.readouterr().err == ""


# --- in the terminal ---

PROGRAM = [sys.executable, "-m", "nanorlhf.people.chat"]


def program(models, *flags, stdin=""):
    words = [*PROGRAM, *flags, "--device", "cpu", "--max-new-tokens", "12"]
    return subprocess.run(words, cwd=models, env=ENVIRONMENT, input=stdin, capture_output=True,
                          text=True)  # fmt: skip


def test_for_a_script_it_prints_the_answer_and_nothing_else(models):
    done = program(models, "a", "--prompt", "Write.", "--seed", "3")
    answer = said(made(models, "a"), [("Write.", [])], seed=3)[1]
    wanted = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in answer).lstrip()
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted + "\n", "")


def test_several_turns_and_every_command(models):
    keys = "Hi.\n\nSo?\n/help\n/compare b\nBoth?\n/compare nowhere\n/compare\n/reset\n/what\nHm."
    done = program(models, "a", "--form", "conversation", stdin=keys)
    assert done.returncode == 0 and not done.stderr.replace(
        "(no longer in the context: the oldest turns, 1 of them)\n", "")
    start, one, _, two, help, _, both, wrong, _, _, what, last, end = done.stdout.split("> ")
    assert "conversation" not in start and r"'\n\nHuman: ...\n\nAssistant:', after all" in start
    assert help == what == chat_module.HELP + "\n"
    assert both.startswith("[a]\n") and "\n[b]\n" in both
    assert wrong.startswith("nowhere is no checkpoint")
    assert all(text.strip() and "[a]" not in text for text in (one, two, last)) and end == "\n"


def test_ctrl_c_stops_the_answer_and_the_next_one_leaves(models, foreground):
    words = [*PROGRAM, "long", "--form", "text", "--device", "cpu", "--max-new-tokens", "3900"]
    process = subprocess.Popen(words, cwd=models, env=ENVIRONMENT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    lines = []
    thread = threading.Thread(target=lambda: lines.extend(iter(lambda: process.stdout.read(1), "")))
    thread.start()

    def wait(text, count=1):
        ends = time.monotonic() + 300
        while "".join(lines).count(text) < count:
            assert time.monotonic() < ends and process.poll() is None, "".join(lines)
            time.sleep(0.05)

    try:
        wait("> ")
        process.stdin.write("Once\n")
        process.stdin.flush()
        begun = len(lines)
        while len(lines) < begun + 5:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.stdin.write("/help\n")
        process.stdin.flush()
        wait(chat_module.HELP, 2)  # it has not ended: the first is its greeting
        assert len("".join(lines)[begun:].split("> ")[0]) < 10_000
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        thread.join()


@pytest.mark.parametrize("flags, message", [
    ("nowhere", "nowhere is no checkpoint"),
    ("a b", "b is not a flag of"),
    ("a --top-p 0", "--top-p: expected 0.001 to 1, came 0.0"),
    ("a --top-k -1", "--top-k: expected 0 or more, came -1"),
    ("a --form x", "invalid choice: 'x'"),
    ("a --max-new-tokens 96 --prompt x", "expected a message of at most 0 tokens, came one of 2"),
])  # fmt: skip
def test_a_mistake_is_one_line(models, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["chat", *flags.split(), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        config.run(chat_module.main, ChatConfig)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1 and message in errors


def test_the_model_may_stand_without_a_flag_before_or_after_others():
    assert config.parse(ChatConfig, ["x", "--top-k", "3"]).policy == "x"
    assert config.parse(ChatConfig, ["--top-k", "3", "x"]).policy == "x"
    assert config.parse(ChatConfig, []).policy == "out/ppo"
