"""Labels by people: what is shown, kept and refused, called as functions, over HTTP, and as a
program that is killed. The page itself is tested in test_label_browser.py."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

import pages
import pytest
import torch
from pages import ENVIRONMENT, ROOT, STRANGERS, request, running

from nanorlhf import environment, tokenizer
from nanorlhf.evaluate import EvaluateConfig, main
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.people import label
from nanorlhf.people.label import LabelConfig, Labels, make_pairs
from nanorlhf.people.page import make_server
from nanorlhf.support import UserError, data, labels
from nanorlhf.support.config import run
from nanorlhf.support.stats import win_rate


def pairs(n, **texts):
    """Pairs whose answers say which they are."""
    made = [dict(id=f"{i:016x}", prompt=f"prompt {i}\n", first=f" one {i}", second=f" two {i}")
            for i in range(n)]  # fmt: skip
    return [pair | texts for pair in made]


@pytest.fixture
def cfg(tmp_path):
    return LabelConfig(out=str(tmp_path / "new" / "labels.jsonl"), policy="P", annotator="anna")


def records(cfg):
    lines = Path(cfg.out).read_text().split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def answer(made, *choices):
    """Label the next pairs: by side, or by the answer that is to win."""
    for choice in choices:
        state = made.state()
        if choice in ("one", "two"):
            choice = "left" if choice in state["left"] else "right"
        made.choose(state["last"] if choice == "undo" else state["showing"], choice, 2.5)


# --- one choice ---


def test_a_choice_is_one_line_with_all_that_is_known_of_it(cfg):
    made = Labels(cfg, pairs(3))
    state = made.state()
    assert state["showing"] == "0000000000000000/1/anna" and state["prompt"] == "prompt 0\n"
    assert {state["left"], state["right"]} == {" one 0", " two 0"}
    made.choose(state["showing"], "right", 3.14159)
    [record] = records(cfg)
    assert abs(datetime.fromisoformat(record.pop("time")).timestamp() - time.time()) < 60
    left = "first" if state["left"] == " one 0" else "second"
    assert record == dict(
        showing=state["showing"], id="0000000000000000", prompt="prompt 0\n", first=" one 0",
        second=" two 0", choice=dict(first="second", second="first")[left], position=left,
        chosen=state["right"], rejected=state["left"], repeat=False, seconds=3.14,
        annotator="anna", policy="P", against="P",
    )  # fmt: skip


def test_what_is_left_is_random_and_the_record_says_what_was(cfg):
    made = Labels(cfg, pairs(200))
    for _ in range(200):
        state = made.state()
        made.choose(state["showing"], "left", 2)
        assert records(cfg)[-1]["chosen"] == state["left"]
    found = records(cfg)
    assert all(r["position"] == r["choice"] and r[r["choice"]] == r["chosen"] for r in found)
    firsts = sum(r["position"] == "first" for r in found)
    assert 80 < firsts < 120
    once, again = ({r["id"]: r["position"] for r in found if r["repeat"] == x} for x in (0, 1))
    assert 0 < sum(once[id] == again[id] for id in again) < len(again)  # drawn anew


def test_both_readers_take_the_file_as_it_is(cfg):
    made = Labels(cfg, pairs(9))
    answer(made, "one", "two", "tie", "both bad", "skip", "one", "undo", "two", "one", "undo")
    choices = "first, second, tie, both bad, skip, first, undo, second, first, undo"
    assert [r["choice"] for r in records(cfg)] == choices.split(", ")
    kept, counts = data.preferences([cfg.out])
    assert [(r["chosen"], r["rejected"]) for r in kept] == [
        (" one 0", " two 0"), (" two 1", " one 1"), (" two 5", " one 5")]  # fmt: skip
    assert counts == {"records": 3, "ties": 2, "skips": 1, "undone labels": 2}
    assert data.describe(counts) == "3 records; left out: 2 undone labels, 2 ties, 1 skip"
    first, second, whose = data.choices(cfg.out)
    assert [a - b for a, b in zip(first, second, strict=True)] == [1, -1, 0, 0, -1]
    assert whose == "P against P"
    demonstrations, _ = data.demonstrations([cfg.out])
    assert [r["response"] for r in demonstrations] == [" one 0", " two 1", " two 5"]
    assert len(data.prompts([cfg.out])[0]) == 5  # a tie has a prompt of use


# --- the same again ---


def test_the_same_showing_twice_is_one_label(cfg):
    made = Labels(cfg, pairs(3))
    showing = made.state()["showing"]
    for choice in "left", "left", "right", "skip":
        made.choose(showing, choice, 1)
    assert len(records(cfg)) == 1 and records(cfg)[0]["choice"] == records(cfg)[0]["position"]


def test_many_threads_at_once_make_one_label(cfg, monkeypatch):
    made = Labels(cfg, pairs(3))
    showing, append = made.state()["showing"], label.append
    monkeypatch.setattr(label, "append", lambda *a: time.sleep(0.05) or append(*a))
    threads = [threading.Thread(target=made.choose, args=(showing, "tie", 1)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records(cfg)) == 1


def test_undo_takes_one_label_back_once_and_the_pair_is_next_again(cfg):
    made = Labels(cfg, pairs(4))
    first = made.state()["showing"]
    answer(made, "one", "two")
    last = made.state()["last"]
    for _ in range(3):
        made.choose(last, "undo")
    assert made.state()["showing"] == last and made.state()["last"] == first
    answer(made, "undo")
    assert made.state()["last"] is None and made.state()["showing"] == first
    assert [r["choice"] for r in records(cfg)] == ["first", "second", "undo", "undo"]
    with pytest.raises(UserError, match="no records; left out: 2 undone labels"):
        data.preferences([cfg.out])
    with pytest.raises(UserError, match="expected choices between the same two models, came none"):
        data.choices(cfg.out)


def test_some_pairs_come_back_ten_pairs_later_and_count_for_self_agreement_alone(cfg):
    made = Labels(cfg, pairs(21))
    shown = []
    while "showing" in made.state():
        shown.append(made.state()["showing"])
        answer(made, "two" if shown[-1] == "0000000000000005/2/anna" else "one")
    numbers = [int(showing.split("/")[0], 16) for showing in shown]
    assert numbers == [*range(11), 0, *range(11, 16), 5, *range(16, 21), 10]
    said = made.state()["progress"]
    assert said == "24 of 24 done \u00b7 self-agreement 2 of 3 \u00b7 2.5 s a label"
    kept, counts = data.preferences([cfg.out])
    assert len(kept) == 21 and counts["repeated labels"] == 3
    assert len(data.choices(cfg.out)[0]) == 21


def test_a_skipped_pair_does_not_come_back(cfg):
    made = Labels(cfg, pairs(12))
    assert made.state()["progress"] == "0 of 13 done"
    answer(made, "skip", *["one"] * 11)
    assert "showing" not in made.state()
    assert made.state()["progress"] == "12 of 12 done \u00b7 2.5 s a label"


def test_the_summary_by_hand():
    def record(id, choice, seconds=2.0, repeat=False):
        return dict(id=id, choice=choice, seconds=seconds, repeat=repeat)

    assert labels.summary([]) == [] == labels.summary([record("a", "skip", 0.1)])
    shown = [record("a", "first"), record("b", "tie", 0.9), record("c", "second", 4.0),
             record("d", "skip"), record("a", "second", 3.0, True),
             record("b", "both bad", 0.2, True), record("c", "skip", 9.0, True),
             record("d", "first", 5.0, True)]  # fmt: skip
    # a: not alike; b: alike, a tie is a tie; c and d were decided once. Times .2 .9 2 3 4 5.
    assert labels.summary(shown) == [
        "self-agreement 1 of 2", "2.5 s a label", "2 in under a second"]  # fmt: skip


# --- started again, and what can be wrong with the file ---


def test_started_again_it_goes_on_at_the_first_pair_without_a_label(cfg):
    made = Labels(cfg, pairs(5))
    answer(made, "one", "skip", "two", "undo")
    before = made.state()
    again = Labels(cfg, pairs(5))
    assert again.state() == before and before["showing"].startswith("0000000000000002")
    answer(again, "two", "tie", "one")
    assert "showing" not in Labels(cfg, pairs(5)).state()
    assert len(records(cfg)) == 7


def test_two_people_share_a_file_and_not_their_labels(cfg):
    anna = Labels(cfg, pairs(3))
    answer(anna, "one", "two", "one")
    cfg.annotator = "ben"
    ben = Labels(cfg, pairs(3))
    assert ben.state()["progress"] == "0 of 3 done"
    answer(ben, "two", "two", "undo")
    assert len(data.preferences([cfg.out])[0]) == 4  # three of Anna's, whose undo this was not
    cfg.annotator = "anna"
    assert Labels(cfg, pairs(3)).state()["progress"].startswith("3 of 3")


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_a_last_line_that_a_crash_cut_goes_and_all_others_stay(cfg, cut):
    made = Labels(cfg, pairs(3))
    answer(made, "one", "two")
    whole = Path(cfg.out).read_bytes()
    first = whole.index(b"\n") + 1
    for damaged in whole[: first + cut] if cut > 0 else whole[:cut], whole[:first]:
        Path(cfg.out).write_bytes(damaged)
        made = Labels(cfg, pairs(3))
        assert Path(cfg.out).read_bytes() == whole[:first]
        assert made.state()["showing"].startswith("0000000000000001")
    answer(made, "two", "tie")
    assert [r["choice"] for r in records(cfg)] == ["first", "second", "tie"]


def test_a_file_that_was_cut_in_its_first_line_is_begun_anew(cfg):
    Path(cfg.out).parent.mkdir()
    Path(cfg.out).write_bytes(b'{"showing": "00')
    answer(Labels(cfg, pairs(3)), "one")
    assert len(records(cfg)) == 1


@pytest.mark.parametrize("content", [b'{"prompt": "p", "text": "t"}\n', b"# Title", b"\x00\x01"])
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(cfg, content):
    Path(cfg.out).parent.mkdir()
    Path(cfg.out).write_bytes(content)
    with pytest.raises(UserError, match="--out: expected a file of labels, and .*labels.jsonl is"):
        Labels(cfg, pairs(3))
    assert Path(cfg.out).read_bytes() == content


def test_a_damaged_line_in_the_middle_is_named(cfg):
    answer(Labels(cfg, pairs(3)), "one", "two")
    lines = Path(cfg.out).read_bytes().split(b"\n")
    Path(cfg.out).write_bytes(b"\n".join([lines[0], lines[1][:40], lines[1], b""]))
    with pytest.raises(UserError, match="labels.jsonl:2: expected JSON"):
        Labels(cfg, pairs(3))


def test_a_folder_is_no_file_of_labels(cfg, tmp_path):
    cfg.out = str(tmp_path)
    with pytest.raises(UserError, match="--out: cannot write .*: Is a directory"):
        Labels(cfg, pairs(3))


def test_each_choice_is_on_the_disk_before_it_is_confirmed(cfg, monkeypatch):
    made, synced = Labels(cfg, pairs(3)), []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(len(records(cfg))) or fsync(file))
    answer(made, "one", "two", "undo")
    assert synced == [1, 2, 3]  # and the whole line was written by then


def test_a_full_disk_is_said_and_leaves_no_half_line(cfg, monkeypatch):
    made = Labels(cfg, pairs(3))
    answer(made, "one")
    before = Path(cfg.out).read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="this choice is not kept: .*: No space left on device"):
            answer(made, "two")
    assert Path(cfg.out).read_bytes() == before
    assert made.state()["showing"].startswith("0000000000000001")
    answer(made, "two")
    assert len(records(cfg)) == 2


# --- what no page can have shown ---


SHOWING = "0000000000000000/1/anna"
WRONG = [
    dict(showing="0000000000000009/1/anna", choice="left", seconds=1),
    dict(showing="0000000000000000/1/ben", choice="left", seconds=1),
    dict(showing=None, choice="left", seconds=1),
    dict(showing=[], choice="left", seconds=1),
    dict(showing=SHOWING, choice="first", seconds=1),
    dict(showing=SHOWING, choice=["left"], seconds=1),
    dict(showing=SHOWING, choice="left", seconds=-1),
    dict(showing=SHOWING, choice="left", seconds=float("nan")),
    dict(showing=SHOWING, choice="left", seconds=1e300),
    dict(showing=SHOWING, choice="left", seconds="1"),
    dict(showing=SHOWING, choice="left", seconds=1, annotator="ben"),
    dict(choice="left"),
    {"self": 1, "\ud83d": 2},
    {"\ud83d": 2},
    ["left"],
    "left",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_was_never_shown_is_refused_and_not_kept(cfg, page, wrong):
    status, _ = page("POST", "/choose", wrong)
    assert status == 400 and records(cfg) == []


# --- pairs ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two untrained models with their tokenizer, in folders a and b."""
    folder, tok = tmp_path_factory.mktemp("models"), tokenizer.learn(environment.prompts(50), 300)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        GPT(GPTConfig(tok.vocab_size, 96, 1, 2, 16)).save(folder / name, tok)
    return folder


def small(models, **settings):
    return LabelConfig(policy=str(models / "a"), prompts=6, max_new_tokens=8, **settings)


def test_pairs_are_two_answers_of_the_policy_and_a_seed_gives_the_same(models):
    made = make_pairs(small(models), "cpu")
    assert [pair["prompt"] for pair in made] == environment.prompts(6, seed=1)
    assert all(pair["first"] != pair["second"] for pair in made)
    assert made == make_pairs(small(models), "cpu") != make_pairs(small(models, seed=2), "cpu")
    assert len({pair["id"] for pair in made}) == 6
    longer = make_pairs(small(models), "cpu")
    assert all(pair["id"] == other["id"] for pair, other in zip(made, longer, strict=True))


def test_two_models_answer_prompts_that_neither_has_seen(models):
    made = make_pairs(small(models, against=str(models / "b")), "cpu")
    alone = make_pairs(small(models, against=str(models / "a")), "cpu")
    assert [pair["prompt"] for pair in made] == environment.prompts(6, seed=1, held_out=True)
    assert [pair["first"] for pair in made] == [pair["first"] for pair in alone]
    assert [pair["second"] for pair in made] != [pair["second"] for pair in alone]


def test_prompts_come_from_files(models, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=f"Say {i}.")) + "\n" for i in range(9)))
    made = make_pairs(small(models, data=[str(path)]), "cpu")
    assert [pair["prompt"] for pair in made] == [f"Say {i}." for i in range(6)]


def test_answers_that_are_all_the_same_cannot_be_compared(models):
    with pytest.raises(UserError, match="came the same twice to every prompt: try a higher --temp"):
        make_pairs(small(models, temperature=1e-9), "cpu")


# --- over HTTP ---


def serving(cfg, made, port=0):
    html = ROOT / "nanorlhf/people/label.html"
    return pages.serving(html, label.actions(Labels(cfg, made)), port)


@pytest.fixture
def page(cfg):
    with serving(cfg, pairs(3)) as port:
        ask = lambda *words, **headers: request(port, *words, **headers)  # noqa: E731
        ask.port = port
        yield ask


def test_the_page_asks_and_the_program_answers(cfg, page):
    status, html = page("GET", "/")
    assert status == 200 and html == (ROOT / "nanorlhf/people/label.html").read_text()
    state = json.loads(page("GET", "/state")[1])
    assert state["left"] and "position" not in state  # which is the first stays hidden
    fields = dict(showing=state["showing"], choice="left", seconds=2)
    status, text = page("POST", "/choose", fields)
    assert status == 200 and json.loads(text)["last"] == state["showing"]
    assert page("POST", "/choose", fields)[1] == text and len(records(cfg)) == 1
    status, text = page("POST", "/choose", dict(showing=state["showing"], choice="undo", seconds=0))
    assert json.loads(text)["showing"] == state["showing"] and len(records(cfg)) == 2


@pytest.mark.parametrize("method, path", [("GET", "/labels.jsonl"), ("GET", "/../label.py"),
                                          ("POST", "/"), ("GET", "/choose")])  # fmt: skip
def test_nothing_else_is_there(page, method, path):
    assert page(method, path)[0] == 404


def test_the_page_may_run_nothing_from_elsewhere_and_stand_in_no_other_page(page):
    with urllib.request.urlopen(f"http://127.0.0.1:{page.port}/") as reply:
        policy = reply.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self' 'unsafe-inline';")
        assert policy.endswith("frame-ancestors 'none'")
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "Access-Control-Allow-Origin" not in reply.headers
    text = (ROOT / "nanorlhf/people/label.html").read_text()
    assert "innerHTML" not in text and "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize("headers", STRANGERS)
@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/state"), ("POST", "/choose")])
def test_pages_of_others_may_neither_read_nor_choose(cfg, page, headers, method, path):
    headers = {name: value.format(port=page.port) for name, value in headers.items()}
    fields = dict(showing=SHOWING, choice="left", seconds=1) if method == "POST" else None
    status, text = page(method, path, fields, **headers)
    assert status == 403 and "prompt" not in text and records(cfg) == []


def test_its_own_page_may_by_either_name_of_this_machine(cfg, page):
    for name in "127.0.0.1", "localhost":
        host = f"{name}:{page.port}"
        fields = dict(showing=json.loads(page("GET", "/state")[1])["showing"], choice="tie")
        assert page("POST", "/choose", fields, Host=host, Origin=f"http://{host}")[0] == 200
    assert len(records(cfg)) == 2


def test_a_form_of_another_site_is_refused_even_without_an_origin(cfg, page):
    """A browser sends text without asking first, JSON only after it has asked."""
    body = json.dumps(dict(showing=SHOWING, choice="left", seconds=1)).encode()
    for kind in "text/plain", "application/x-www-form-urlencoded", "":
        assert page("POST", "/choose", body, Content_Type=kind)[0] == 400
    assert records(cfg) == []


@pytest.mark.parametrize("length", ["1048577", "99999999999", "9" * 5000, "-1", "x", "", None])
def test_a_body_has_a_length_and_a_small_one(cfg, page, length):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.putrequest("POST", "/choose")
    connection.putheader("Content-Type", "application/json")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == 400 and records(cfg) == []
    connection.close()


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 4000, b"{}", b"null", b"9" * 4000])
def test_a_body_that_is_no_choice_is_refused(cfg, page, body):
    assert page("POST", "/choose", body)[0] == 400 and records(cfg) == []
    assert page("GET", "/state")[0] == 200


def test_other_machines_cannot_reach_it(cfg):
    server = make_server(None, {}, 0)
    host, port = server.server_address
    assert host == "127.0.0.1"
    with pytest.raises(UserError, match=f"--port: cannot use {port}: Address already in use"):
        make_server(None, {}, port)
    server.server_close()


def test_a_browser_that_goes_away_disturbs_nobody(cfg, page, capfd):
    for sent in b"", b"GET /st", b"POST /choose HTTP/1.1\r\nContent-Length: 100\r\n\r\n{":
        with socket.create_connection(("127.0.0.1", page.port)) as connection:
            connection.sendall(sent)
    assert page("GET", "/state")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_full_disk_reaches_the_page_as_text(cfg, page, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, text = page("POST", "/choose", dict(showing=SHOWING, choice="left"))
    assert status == 500 and text.startswith("this choice is not kept: cannot write ")


# --- between two models ---


def test_names_are_told_after_the_choice_and_only_between_two_models(cfg):
    made = Labels(cfg, pairs(3))
    answer(made, "one")
    assert made.state()["revealed"] == ""
    cfg.against, cfg.out = "Q", cfg.out + "2"
    made = Labels(cfg, pairs(3))
    state = made.state()
    assert state["revealed"] == "" and "P" not in json.dumps(state)
    answer(made, "one")
    names = ["P", "Q"] if "one" in state["left"] else ["Q", "P"]
    assert made.state()["revealed"] == "The last pair: 1 was by {}, 2 by {}.".format(*names)
    assert records(cfg)[0]["policy"] == "P" and records(cfg)[0]["against"] == "Q"


def test_a_judge_by_people_says_who_wins(cfg, capsys):
    cfg.against = "Q"
    made = Labels(cfg, pairs(8))
    answer(made, "one", "one", "tie", "one", "two", "skip", "both bad", "one")
    main(EvaluateConfig(judge=cfg.out, device="cpu"))
    rate, low, high = win_rate([1, 1, 0, 1, -1, 0, 1], [0] * 7)
    assert capsys.readouterr().out == (
        f"win rate {rate:.3f} (95 %: {low:.3f} to {high:.3f}) over 7 choices, of P against Q\n"
    )
    assert rate == 5 / 7


def test_choices_between_other_models_are_not_mixed_in(cfg):
    answer(Labels(cfg, pairs(2)), "one", "two")
    cfg.against = "Q"
    answer(Labels(cfg, pairs(3)), "one")
    with pytest.raises(UserError, match="the same two models, came P against P and P against Q"):
        data.choices(cfg.out)
    assert len(data.preferences([cfg.out])[0]) == 3  # to learn from, all of them are good


# --- as a program ---

PROGRAM = [sys.executable, "-m", "nanorlhf.people.label", "--no-open", "--device", "cpu",
           "--prompts", "6", "--max-new-tokens", "8"]  # fmt: skip


def test_a_program_that_is_killed_loses_nothing_and_doubles_nothing(models):
    port, out = 0, models / "out" / "labels.jsonl"
    wanted = ["left", "right", "tie", "both bad", "skip", "left"]
    for i in 0, 2:
        with running(models, *PROGRAM, "--port", str(port), "--policy", "a") as (process, port):
            state = json.loads(request(port, "GET", "/state")[1])
            assert state["progress"].startswith(f"{i} of 6")
            for choice in wanted[i : i + 2]:
                fields = dict(showing=state["showing"], choice=choice, seconds=1.5)
                status, text = request(port, "POST", "/choose", fields)
                state = json.loads(text)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with open(out, "ab") as file:
            file.write(b'{"showing": "00')  # as if killed in the middle of a line
    words = [*PROGRAM, "--policy", "a", "--terminal"]
    done = subprocess.run(words, cwd=models, env=ENVIRONMENT, input="s\n1\n1\n",
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = [json.loads(line) for line in out.read_text().splitlines()]
    pairs = make_pairs(small(models), "cpu")
    assert [r["id"] for r in shown] == [pair["id"] for pair in pairs]
    sides = [r["choice"] if r["choice"] not in ("first", "second") else
             "left" if r["choice"] == r["position"] else "right" for r in shown]  # fmt: skip
    assert sides == wanted
    assert "every pair has a label" in done.stdout
    labels = Path("out/labels.jsonl")
    assert f"next: python train_rm.py --data {labels} --sft a --init out/rm" in done.stdout
    assert data.preferences([out])[1] == {"records": 3, "ties": 2, "skips": 1}


def test_ctrl_c_ends_it_with_the_next_command(models, tmp_path, foreground):
    flags = "--port", "0", "--policy", "a", "--against", "b", "--out", str(tmp_path / "x")
    with running(models, *PROGRAM, *flags) as (process, port):
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    assert f"next: python -m nanorlhf.evaluate --judge {tmp_path / 'x'}" in printed


def test_the_terminal_asks_the_same(cfg, monkeypatch, capsys):
    hostile = "a\x1b[2Jb\u202ec\x07\nd"
    made = Labels(cfg, pairs(3, second=hostile))
    keys = iter(["u", "1", "x", "", "S", "u", "4 ", "3", "1", "u", "2", "q", "1"])
    monkeypatch.setattr("builtins.input", lambda menu: next(keys))
    label.in_terminal(made)
    assert next(keys) == "1"  # q has ended it
    found = [r["choice"] for r in records(cfg)]
    assert found[1:5] == ["skip", "undo", "both bad", "tie"] and found[5] == "undo"
    assert found[0] == records(cfg)[0]["position"] and found[6] != records(cfg)[6]["position"]
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and "\x07" not in printed
    assert "a\ufffd[2Jb\ufffdc\ufffd\n        d" in printed


@pytest.mark.parametrize("flags, message", [
    ("--policy nowhere", "nowhere is no checkpoint"),
    ("--policy a --against nowhere", "nowhere is no checkpoint"),
    ("--policy a --data nowhere.jsonl", "nowhere.jsonl:1: expected a file to read"),
    ("--policy a --out a/config.json", "--out: expected a file of labels"),
    ("--policy a --out a", "--out: cannot write a: Is a directory"),
    ("--policy a --port 70000", "--port: expected 0 to 65535, came 70000"),
    ("--policy a --max-new-tokens 96", "expected room for a prompt"),
])  # fmt: skip
def test_a_mistake_is_one_line(models, flags, message, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", [*PROGRAM[2:], *flags.split()])
    with pytest.raises(SystemExit) as end:
        run(label.main, LabelConfig)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and errors.count("\n") == 1 and message in errors
    assert "n_positions" in (models / "a" / "config.json").read_text()
