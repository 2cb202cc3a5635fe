"""What is in a file ends up in a batch, in a count, or in an error that names the line."""

import gzip
import json
import random
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch

from nanorlhf.support import UserError
from nanorlhf.support.data import (
    collate,
    demonstrations,
    describe,
    encode,
    encode_pairs,
    encode_prompts,
    endless,
    in_parts,
    preferences,
    prompts,
    split,
)


class Letters:
    """A tokenizer with one token for each letter."""

    eos, pad = 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]


LETTERS = Letters()


@pytest.fixture
def file(tmp_path):
    """Records -> a JSON Lines file, one record a line; a string is a line as it stands."""

    def write(*records, name="data.jsonl"):
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        data = "".join(line + "\n" for line in lines).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return write


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def hh(chosen, rejected, prompt="\n\nHuman: Hi\n\nAssistant:"):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


# --- one record, many spellings ---


PREFERENCE = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " No."}


@pytest.mark.parametrize(
    "spelling",
    [
        PREFERENCE,
        hh(" Hello!", " No."),
        {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("No.")]},
        {
            "chosen": [user("Hi"), assistant("Hello!")],
            "rejected": [user("Hi"), assistant("No.")],
            "other keys": "are nobody's business",
        },
    ],
)
def test_a_preference_reads_the_same_in_every_spelling(file, spelling):
    path = file(spelling)
    assert preferences([path]) == ([PREFERENCE], {"records": 1})
    demonstration = {"prompt": PREFERENCE["prompt"], "response": " Hello!"}
    assert demonstrations([path]) == ([demonstration], {"records": 1})
    assert prompts([path])[0] == [PREFERENCE["prompt"]]


@pytest.mark.parametrize(
    "spelling, prompt, response",
    [
        ({"prompt": "2 + 2 =", "response": " 4"}, "2 + 2 =", " 4"),
        ({"text": "Once upon a time"}, "", "Once upon a time"),
        ({"messages": [user("Hi"), assistant("Yes?")]}, "\n\nHuman: Hi\n\nAssistant:", " Yes?"),
        (
            {"prompt": [user("Hi")], "response": [assistant("Yes?")]},
            "\n\nHuman: Hi\n\nAssistant:",
            " Yes?",
        ),
    ],
)
def test_a_demonstration_reads_the_same_in_every_spelling(file, spelling, prompt, response):
    records, counts = demonstrations([file(spelling)])
    assert records == [{"prompt": prompt, "response": response}] and counts["records"] == 1


def test_a_conversation_is_rendered_as_hh_writes_it(file):
    turns = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Yes?"), user("Bye")]
    rendered = "Be kind.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
    assert prompts([file({"prompt": turns})])[0] == [rendered]


def test_the_prompt_of_a_transcript_reaches_to_the_last_assistant_turn(file):
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    records, _ = preferences([file(hh(" d", " e\n\nHuman: f", dialogue))])
    # The rejected answer speaks for the human: its own fault, and it keeps it.
    assert records == [{"prompt": dialogue, "chosen": " d", "rejected": " e\n\nHuman: f"}]


def test_prompts_are_distinct_and_keep_their_order(file):
    path = file({"prompt": "b"}, {"prompt": "a", "response": "x"}, {"prompt": "b"}, {"text": "t"})
    found, counts = prompts([path, path])
    assert found == ["b", "a"]
    assert counts == {"records": 2, "repeats": 4, "empty prompts": 2}


def test_gz_is_read_like_plain_and_files_add_up(file):
    plain, packed = file({"text": "a"}), file({"text": "b"}, name="more.jsonl.gz")
    records, _ = demonstrations([plain, str(packed)])
    assert [r["response"] for r in records] == ["a", "b"]


def test_line_separators_inside_a_string_do_not_end_the_line(file):
    text = "one\u2028two\u2029three\u0085four"
    assert demonstrations([file({"text": text})])[0][0]["response"] == text


def test_half_a_surrogate_pair_cannot_reach_a_printer(file):
    records, _ = demonstrations([file(r'{"text": "a\ud83d b"}')])
    assert records[0]["response"] == "a? b"


def test_blank_lines_and_a_byte_order_mark_do_no_harm(file):
    assert len(demonstrations([file('\ufeff{"text": "a"}', "", '{"text": "b"}\r')])[0]) == 2


# --- messy: counted and left out ---


def test_ties_forks_and_empty_answers_are_left_out_and_counted(file):
    fork = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}
    longer = hh(" b", " b\n\nHuman: c\n\nAssistant: d")  # begins alike, and goes one turn further
    good, tie, empty = hh(" yes", " no"), hh(" same", " same"), hh(" yes", " ")
    records, counts = preferences([file(fork, good, tie, longer, empty, hh("", " no"))])
    assert [r["chosen"] for r in records] == [" yes"]
    assert counts == {"records": 1, "forks": 2, "ties": 1, "empty answers": 2}


def test_for_a_demonstration_only_the_chosen_answer_matters(file):
    path = file(hh(" same", " same"), hh(" yes", ""), hh("", " no"), hh(" \n", " no"))
    records, counts = demonstrations([path])
    assert [r["response"] for r in records] == [" same", " yes"]
    assert counts == {"records": 2, "empty answers": 2}


def test_describe_says_it_in_one_line():
    counts = Counter({"ties": 34, "forks": 1, "records": 6240, "repeats": 0, "truncated": 1411})
    assert describe(counts) == "6,240 records; left out: 34 ties, 1 fork; truncated: 1,411"
    assert describe(Counter(records=1)) == "1 record"


@pytest.mark.parametrize(
    "tranche, pairs, ties, empty, forks",
    [
        ("harmless-base", 2312, 0, 4, 5),
        ("helpful-base", 2354, 2, 4, 9),
        ("helpful-online", 1137, 2, 3, 0),
        ("helpful-rejection-sampled", 2749, 32, 0, 3),
    ],
)
def test_real_hh_files_hold_the_mess_they_are_known_for(
    real_data, tranche, pairs, ties, empty, forks
):
    path = real_data / "hh-rlhf" / tranche / "test.jsonl.gz"
    records, counts = preferences([path])
    assert (counts["ties"], counts["empty answers"], counts["forks"]) == (ties, empty, forks)
    assert len(records) == counts["records"] == pairs - ties - empty - forks
    assert all(r["prompt"].endswith("\n\nAssistant:") for r in records)
    train, held_out = split(records)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert 0.07 < len(held_out) / len(records) < 0.13


# --- malformed: named by file and line ---


GOOD = {"prompt": "p", "response": "r"}


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{not json", "JSON"),
        ("[1, 2]", r"JSON in UTF-8, an object; came b'\[1, 2\]"),
        ("[" * 100_000, "JSON"),
        ('{"text": ' + "9" * 5000 + "}", "JSON"),
        ({"prompt": "p", "reply": "c"}, r"came the keys \['prompt', 'reply'\]"),
        ({"response": "r"}, r"came the keys \['response'\]"),
        ({"prompt": "p", "chosen": "c"}, r"came the keys \['prompt', 'chosen'\]"),
        ({}, r"came the keys \[\]"),
        ({"text": None}, "expected text to be a string, came None"),
        ({"prompt": 3, "response": "r"}, "expected prompt to be a string, came 3"),
        ({"prompt": "p", "response": 3}, "expected response to be a string, came 3"),
        ({"prompt": [user("p")], "response": "r"}, r"expected prompt to be a string, came \["),
        ({"prompt": "p", "response": [assistant("r")]}, "expected turn 1 to have .*, came 'p'"),
        ({"prompt": 3, "response": [assistant("r")]}, "expected turn 1 to have .*, came 3"),
        ({"prompt": [user("p")], "response": []}, "expected an answer"),
        ({"chosen": "no turns", "rejected": "none"}, r"'\\n\\nAssistant:' in chosen"),
        ({"messages": []}, r"expected turn 1 to have .*, came \[\]"),
        ({"messages": [user("nobody answers")]}, "expected an answer"),
        ({"messages": [user("p"), {"role": "critic", "content": "c"}]}, "turn 2.*'critic'"),
        ({"messages": [user("p"), {"role": "system", "content": "s"}]}, "turn 2.*'system'"),
        ({"messages": ["hello"]}, "turn 1.*'hello'"),
        ({"messages": [{"role": "user"}]}, "expected content to be a string, came None"),
        (
            {"messages": [user(["p"]), assistant("r")]},
            r"expected content to be a string, came \['p'\]",
        ),
    ],
)
def test_a_malformed_line_is_named(file, bad, message):
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{message}"):
        demonstrations([file(GOOD, bad, GOOD)])


def test_a_demonstration_is_no_preference(file):
    with pytest.raises(UserError, match=r"data\.jsonl:1: expected two answers.*'response'"):
        preferences([file(GOOD)])
    ends_with_user = {"chosen": [user("a")], "rejected": [user("b")]}
    with pytest.raises(UserError, match=r"data\.jsonl:1: expected two answers"):
        preferences([file(ends_with_user)])


def test_bytes_that_are_not_utf8_are_named(file):
    path = file(GOOD)
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: expected JSON in UTF-8"):
        demonstrations([path])


def test_damaged_gzip_is_named(file):
    path = file(*[{"text": str(random.random())} for _ in range(2000)], name="data.jsonl.gz")
    whole = path.read_bytes()
    damaged = [whole[: len(whole) // 2], whole[:500] + bytes(50) + whole[550:], b"not a gzip\n"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"data\.jsonl\.gz:\d+: expected"):
            demonstrations([path])


def test_a_missing_a_folder_and_an_empty_file_are_named(tmp_path, file):
    for path in (tmp_path / "nowhere.jsonl", tmp_path, file(), file(name="data.jsonl.gz")):
        with pytest.raises(UserError, match=rf"{path}:1: expected"):
            demonstrations([path])


def test_nothing_left_is_an_error_that_says_why(file):
    with pytest.raises(UserError, match=r"data\.jsonl: .*no records; left out: 2 ties"):
        preferences([file(hh(" a", " a"), hh(" b", " b"))])


# --- splitting ---


def test_a_prompt_is_on_one_side_whatever_the_order_or_the_company():
    records = [{"prompt": f"p{i % 500}", "response": str(i)} for i in range(1000)]
    train, held_out = split(records)
    sides = [{r["prompt"] for r in train}, {r["prompt"] for r in held_out}]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 1000
    assert 0.05 < len(held_out) / 1000 < 0.15

    _, backwards = split(records[::-1])
    assert {r["prompt"] for r in backwards} == sides[1]
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(300)]
    assert {r["prompt"] for r in split(pairs)[1]} == sides[1] & {r["prompt"] for r in pairs}


def test_plain_text_is_split_by_the_text():
    held_out = split([{"prompt": "", "response": f"text {i}"} for i in range(200)])[1]
    assert 5 < len(held_out) < 40


def test_the_smallest_set_still_holds_one_out():
    records = [{"prompt": p, "response": "r"} for p in "ab"]
    train, held_out = split(records)
    assert len(train) == len(held_out) == 1
    with pytest.raises(UserError, match="two different prompts"):
        split(records[:1])


# --- rows ---


def letters(row):
    tokens, prompt_len = row
    text = "".join(chr(t) if t > 1 else "." for t in tokens)  # . is the end token
    return text[:prompt_len], text[prompt_len:]


def one_row(prompt, response, block_size):
    counts = Counter()
    rows = encode([{"prompt": prompt, "response": response}], LETTERS, block_size, counts)
    return *letters(rows[0]), counts["truncated"]


def test_a_row_is_prompt_response_end():
    assert one_row("abc", "xyz", block_size=7) == ("abc", "xyz.", 0)


def test_a_long_prompt_loses_its_left():
    assert one_row("abc", "xyz", block_size=6) == ("bc", "xyz.", 1)


def test_a_long_response_loses_its_right_and_with_it_the_end():
    assert one_row("abc", "xyz", block_size=5) == ("c", "xyz.", 1)
    assert one_row("abc", "xyz", block_size=4) == ("c", "xyz", 1)
    assert one_row("c", "xyz", block_size=4) == ("c", "xyz", 1)
    assert one_row("abc", "xyz", block_size=2) == ("c", "x", 1)


def test_plain_text_is_cut_into_rows_that_predict_each_token_once():
    counts = Counter()
    for length in range(1, 20):
        text = "abcdefghijklmnopqrstuvwxyz"[:length]
        rows = encode([{"prompt": "", "response": text}], LETTERS, 5, counts)
        assert all(2 <= len(tokens) <= 5 and prompt_len == 1 for tokens, prompt_len in rows)
        assert "".join(letters(row)[1] for row in rows) == text + "."
        assert rows[0][0][0] == LETTERS.eos  # GPT-2 begins every text so
        assert all(before[-1] == after[0] for (before, _), (after, _) in pairwise(rows))
    assert not counts["truncated"]  # nothing is lost


def test_both_rows_of_a_pair_have_the_same_prompt_tokens():
    counts = Counter()
    record = {"prompt": "abcdef", "chosen": "x", "rejected": "xyz"}
    chosen, rejected = encode_pairs([record], LETTERS, 7, counts)[0]
    assert (letters(chosen), letters(rejected)) == (("def", "x."), ("def", "xyz."))
    assert counts["truncated"] == 1
    assert letters(encode_pairs([record | {"prompt": ""}], LETTERS, 7, counts)[0][0]) == (".", "x.")


def test_long_prompts_keep_their_end():
    counts = Counter()
    assert encode_prompts(["ab", "abcd", ""], LETTERS, 3, counts) == [
        [97, 98], [98, 99, 100], [LETTERS.eos]
    ]  # fmt: skip
    assert counts["truncated"] == 1
    with pytest.raises(UserError, match="came 0"):
        encode_prompts(["ab"], LETTERS, 0, counts)


# --- batches ---


def test_collate_is_flush_left_and_masks_the_response():
    tokens, prompt_len, mask = collate([([5, 6, 7, 0], 2), ([8, 9], 1), ([3, 4, 2], 2)], pad=1)
    assert tokens.tolist() == [[5, 6, 7, 0], [8, 9, 1, 1], [3, 4, 2, 1]]
    assert prompt_len.tolist() == [2, 1, 2]
    assert mask.tolist() == [[True, True], [True, False], [True, False]]
    assert (tokens.dtype, prompt_len.dtype, mask.dtype) == (torch.long, torch.long, torch.bool)


def epoch(rows, batch_size, seed=0, **kwargs):
    """The batches of one pass over the rows."""
    return list(islice(endless(rows, batch_size, seed, **kwargs), -(-len(rows) // batch_size)))


def test_batches_of_similar_length_waste_little():
    rows = [([0] * random.Random(i).randrange(2, 50), 1) for i in range(1000)]
    lengths = [[len(tokens) for tokens, _ in batch] for batch in epoch(rows, 8)]
    padded, real = sum(max(batch) * len(batch) for batch in lengths), sum(map(sum, lengths))
    assert padded < 1.1 * real  # unsorted, it is about 1.7 times


def test_which_rows_meet_and_which_batch_comes_first_is_left_to_chance():
    rows = [([i] * (2 + i // 20), 1) for i in range(200)]  # twenty rows of each length
    batches, again, others = (epoch(rows, 8, seed) for seed in (0, 0, 1))
    assert batches == again
    assert sorted(map(sorted, batches)) != sorted(map(sorted, others))
    firsts = [len(batch[0][0]) for batch in batches]
    assert firsts != sorted(firsts)


def test_what_makes_a_row_long_is_for_the_caller_to_say():
    short, long = ([0] * 3, 1), ([0] * 30, 1)
    pairs = [(short, short), (short, long), (short, short), (long, short)]
    for seed in range(10):
        batches = epoch(pairs, 2, seed, length=lambda pair: max(len(tokens) for tokens, _ in pair))
        assert sorted(batch.count((short, short)) for batch in batches) == [0, 2]


# --- epoch after epoch ---

SEVEN = [([i] * (2 + i % 3), 1) for i in range(7)]  # three batches an epoch, the last of one row


def test_every_row_is_in_one_batch():
    rows = [([i] * random.Random(i).randrange(2, 50), 1) for i in range(1003)]
    batches = epoch(rows, 8)
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    assert sorted(map(len, batches))[:2] == [3, 8] and max(map(len, batches)) == 8


def test_every_epoch_holds_every_row_once_and_has_an_order_of_its_own():
    batches = list(islice(endless(SEVEN, 3, seed=1), 12))
    epochs = [sum(batches[i : i + 3], []) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == sorted(SEVEN) for epoch in epochs)
    assert len({repr(epoch) for epoch in epochs}) > 1
    assert batches != list(islice(endless(SEVEN, 3, seed=2), 12))


def test_resumed_at_any_step_it_goes_on_as_if_never_interrupted():
    uninterrupted = list(islice(endless(SEVEN, 3, seed=1), 12))
    for step in range(10):  # within an epoch, at its end, and epochs later
        resumed = list(islice(endless(SEVEN, 3, seed=1, start=step), 12 - step))
        assert resumed == uninterrupted[step:]


def test_nobody_waits_for_a_batch_that_cannot_come():
    for rows, batch_size in ([], 3), (SEVEN, 0), (SEVEN, -1):
        came = f"came {len(rows)} rows and a batch size of {batch_size}"
        with pytest.raises(UserError, match=came):
            next(endless(rows, batch_size, seed=1))


def test_the_random_state_of_the_run_is_left_alone():
    random.seed(0)
    before = random.getstate()
    next(endless(SEVEN, 3, seed=1))
    assert random.getstate() == before


@pytest.mark.parametrize("size, parts", [(2, [[0, 1], [2, 3], [4]]), (9, [[0, 1, 2, 3, 4]])])
def test_in_parts_loses_nothing(size, parts):
    assert list(in_parts(range(5), size)) == [range(part[0], part[-1] + 1) for part in parts]
    assert list(in_parts([1, 2], 0)) == [[1, 2]] and list(in_parts([], 0)) == []
