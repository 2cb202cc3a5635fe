"""GPT-2 by name, from a hub on the loopback address that misbehaves in every way but one."""

import dataclasses
import hashlib
import json
import random
import socket
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import transformers

import train_sft
from nanorlhf import evaluate, tokenizer
from nanorlhf.model import GPT, GPTConfig, ScalarGPT
from nanorlhf.sft import SFTConfig
from nanorlhf.support import UserError, bpe_files, pretrained

CONTENT = random.Random(0).randbytes(300_000)
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
PATH = f"/hub/openai-community/gpt2/resolve/{REVISION}/model.safetensors"
TINY = GPTConfig(vocab_size=17, n_positions=12, n_layer=2, n_head=4, n_embd=16)


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, asked = self.server, self.headers["Range"]
        hub.asked.append((self.path, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if hub.ranges else 0
        body, stop = memoryview(hub.content)[start:], hub.stops_after
        if hub.moved and self.path == PATH:
            self.send_response(302)
            self.send_header("Location", "/moved")
        else:
            whole = 206 if hub.ranges else 200
            self.send_response(hub.status or (whole if body else 416))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:stop])
        if stop:
            hub.go_on.wait(10)
            self.wfile.write(body[stop:] if hub.goes_on else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serves hub.content as gpt2's weights, and keeps what it was asked for in hub.asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.asked, server.go_on = [], threading.Event()
        server.go_on.set()
        server.ranges, server.goes_on = True, False
        server.status = server.moved = server.stops_after = None
        server.folder = tmp_path / "cache" / "gpt2"
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/hub/")
        monkeypatch.setenv("NANORLHF_CACHE", str(server.folder.parent))
        monkeypatch.setenv("no_proxy", "*")
        publish(server, monkeypatch, CONTENT)
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.go_on.set()
        server.shutdown()


def publish(hub, monkeypatch, content):
    """These bytes are now gpt2: two layers, two heads, 16 channels."""
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(pretrained.PUBLISHED, "gpt2", (REVISION, sha256, 2, 2, 16))
    hub.content = content


def names(folder):
    return {path.name for path in folder.iterdir()}


def is_whole(folder):
    found = (folder / "model.safetensors").read_bytes()
    return found == CONTENT and names(folder) == {"config.json", "model.safetensors"}


# --- downloading ---


def test_the_weights_are_downloaded_once_and_then_never_again(hub):
    assert pretrained.fetch("gpt2") == hub.folder and is_whole(hub.folder)
    assert pretrained.fetch("gpt2") == hub.folder
    assert hub.asked == [(PATH, "bytes=0-")]


def test_each_name_has_a_place_and_a_size_of_its_own(hub):
    hub.status = 404
    for name, (revision, sha256, *size) in pretrained.PUBLISHED.items():
        assert len(bytes.fromhex(revision)) == 20 and len(bytes.fromhex(sha256)) == 32
        with pytest.raises(UserError, match="404"):
            pretrained.fetch(name)
        place = f"/hub/openai-community/{name}/resolve/{revision}/model.safetensors"
        assert hub.asked[-1] == (place, "bytes=0-")
        config = json.loads((hub.folder.parent / name / "config.json").read_text())
        assert [config[k] for k in ("n_layer", "n_head", "n_embd")] == size
    assert len(hub.asked) == 4


def test_a_broken_download_goes_on_where_it_broke(hub):
    hub.stops_after = 200_000
    with pytest.raises(UserError, match="100,000 bytes are missing; 200,000 bytes have"):
        pretrained.fetch("gpt2")
    assert names(hub.folder) == {"config.json", "model.safetensors.part"}
    hub.stops_after = None
    assert is_whole(pretrained.fetch("gpt2"))
    assert [asked for _, asked in hub.asked] == ["bytes=0-", "bytes=200000-"]


def test_a_hub_that_knows_no_ranges_sends_it_all_again(hub):
    hub.ranges, hub.stops_after = False, 200_000
    with pytest.raises(UserError, match="200,000 bytes have arrived"):
        pretrained.fetch("gpt2")
    hub.stops_after = None
    assert is_whole(pretrained.fetch("gpt2"))


def test_the_range_survives_a_redirect(hub):
    hub.folder.mkdir(parents=True)
    (hub.folder / "model.safetensors.part").write_bytes(CONTENT[:1000])
    hub.moved = True
    assert is_whole(pretrained.fetch("gpt2"))
    assert hub.asked == [(PATH, "bytes=1000-"), ("/moved", "bytes=1000-")]


def test_a_download_that_was_complete_is_only_checked(hub):
    hub.folder.mkdir(parents=True)
    (hub.folder / "model.safetensors.part").write_bytes(CONTENT)
    assert is_whole(pretrained.fetch("gpt2"))
    assert hub.asked == [(PATH, "bytes=300000-")]  # and the answer was: nothing there


@pytest.mark.parametrize("wrong", [b"x", CONTENT[1:], CONTENT + b"x"])
def test_what_has_the_wrong_hash_is_removed_and_the_next_try_starts_anew(hub, wrong):
    hub.folder.mkdir(parents=True)
    (hub.folder / "model.safetensors.part").write_bytes(wrong)
    with pytest.raises(UserError, match=f"expected .* {hashlib.sha256(CONTENT).hexdigest()}, came"):
        pretrained.fetch("gpt2")
    assert names(hub.folder) == {"config.json"}
    assert is_whole(pretrained.fetch("gpt2"))


def test_a_silent_hub_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr(pretrained, "TIMEOUT", 0.2)
    hub.stops_after = 131_072
    hub.go_on.clear()
    with pytest.raises(UserError, match="timed out; 131,072 bytes have arrived"):
        pretrained.fetch("gpt2")


def test_two_at_once_do_not_spoil_each_others_file(hub):
    """The second takes up what the first has so far, and is ready before it."""
    hub.stops_after, hub.goes_on = 150_000, True
    hub.go_on.clear()
    part = hub.folder / "model.safetensors.part"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(pretrained.fetch, "gpt2")
        while not (part.exists() and part.stat().st_size):
            assert not first.done()
        hub.stops_after = None
        assert is_whole(pretrained.fetch("gpt2"))
        hub.go_on.set()
        assert first.result(10) == hub.folder and is_whole(hub.folder)
    assert len(hub.asked) == 2 and hub.asked[1] != (PATH, "bytes=0-")


def test_a_download_is_never_held_in_memory(hub, monkeypatch):
    publish(hub, monkeypatch, bytes(8_000_000))
    tracemalloc.start()
    pretrained.fetch("gpt2")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


# --- where it cannot be ---


def test_without_a_network_it_says_what_to_put_where(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"{address}/hub")
        with pytest.raises(UserError) as error:
            pretrained.fetch("gpt2")
    assert f"cannot download {address}{PATH} to {hub.folder}: " in str(error.value)
    assert "0 bytes have arrived" in str(error.value) and "by hand" in str(error.value)
    # By hand, then: and no network is needed any more.
    (hub.folder / "model.safetensors").write_bytes(CONTENT)
    assert pretrained.fetch("gpt2") == hub.folder and (hub.folder / "config.json").exists()


def test_an_endpoint_that_is_no_address(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    with pytest.raises(UserError, match="cannot download nonsense/openai-community.*unknown url"):
        pretrained.fetch("gpt2")


def test_a_cache_that_is_no_folder(hub):
    hub.folder.parent.write_text("a file")
    with pytest.raises(UserError, match="cannot download .* 0 bytes have arrived"):
        pretrained.fetch("gpt2")


def test_a_disk_that_is_full(hub):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="too large; 100,000 bytes have arrived"):
            pretrained.fetch("gpt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_whole(pretrained.fetch("gpt2"))  # there is room again


# --- a model by name ---


@pytest.fixture
def published(hub, monkeypatch, tmp_path):
    """A random GPT-2 of transformers, which is what the hub serves from now on."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for w in model.parameters():
            w += 0.1 * torch.randn_like(w)
    model.eval().save_pretrained(tmp_path / "theirs")
    publish(hub, monkeypatch, (tmp_path / "theirs" / "model.safetensors").read_bytes())
    return model


def test_a_model_by_name_gives_the_same_logits_as_transformers(hub, published):
    tokens = torch.randint(50257, (2, 30), generator=torch.Generator().manual_seed(0))
    model = GPT.load("gpt2", dropout=0.1)
    assert model.config == GPTConfig(50257, 1024, 2, 2, 16, dropout=0.1)
    with torch.no_grad():
        assert torch.allclose(model(tokens), published(tokens).logits, atol=1e-4)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(hub.folder)
        assert torch.equal(theirs(tokens).logits, published(tokens).logits)
        trunk = ScalarGPT.load("gpt2").transformer
        assert torch.equal(trunk(tokens), model.transformer(tokens))
    assert len(hub.asked) == 1


def test_every_published_model_has_gpt2s_vocabulary(gpt2_cache):
    assert set(tokenizer.GPT2) == pretrained.PUBLISHED.keys()
    ranks = tokenizer.load("gpt2").ranks
    assert all(tokenizer.load(name).ranks == ranks for name in pretrained.PUBLISHED)


# --- one more token: pad ---


def gpt2_like():
    """All its logits are far below zero, as GPT-2's are. -> a model and its hidden states"""
    torch.manual_seed(0)
    model = GPT(TINY).double().eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(5.0)
        model.transformer.wte.weight.add_(-0.5)
    return model, model.transformer(torch.randint(17, (3, 10)))


def test_a_new_token_is_less_likely_than_the_average_one():
    model, hidden = gpt2_like()
    before = model.head(hidden)
    assert before.max() < -20  # a row of zeros would win
    assert model.resize_vocab(18) is model
    after = model.head(hidden)
    assert after.shape == (3, 10, 18)
    assert torch.allclose(after[..., :17], before, rtol=0, atol=1e-12)
    assert torch.allclose(after[..., 17], before.mean(-1), rtol=0, atol=1e-12)
    assert (after.softmax(-1)[..., 17] < 1 / 18).all()


def test_a_grown_model_is_a_model_like_any_other(tmp_path):
    for model in GPT(TINY).eval(), ScalarGPT(TINY).eval():
        tokens = torch.tensor([[1, 2, 3, 19]])
        before = model.transformer(tokens[:, :3])
        model.resize_vocab(20)
        assert torch.equal(model.transformer(tokens[:, :3]), before)
        model(tokens).sum().backward()
        assert model.transformer.wte.weight.grad.shape == (20, 16)
        model.save(tmp_path)
        again = type(model).load(tmp_path)
        assert again.config == dataclasses.replace(TINY, vocab_size=20)
        assert torch.equal(again(tokens), model(tokens))
    assert TINY.vocab_size == 17


def test_a_vocabulary_that_fits_stays_and_one_too_small_is_refused():
    model = GPT(TINY)
    before = model.transformer.wte.weight.clone()
    assert torch.equal(model.resize_vocab(17).transformer.wte.weight, before)
    with pytest.raises(UserError, match="at least the model's 17 tokens, came one of 16"):
        model.resize_vocab(16)


# --- the commands ---


@pytest.mark.parametrize("init", ["gpt2", "folder"])
def test_sft_begins_with_gpt2_and_evaluate_compares_with_it(
    hub, published, gpt2_cache, tmp_path, init, capsys
):
    """The folder is as Hugging Face serves it: no token for padding, neither row nor name."""
    tok = tokenizer.load("gpt2")
    if init == "folder":
        init = str(tmp_path / "theirs")
        tok.save(init)
        vocab = bpe_files.spell_vocab(tok.ranks)
        del vocab[bpe_files.PAD]
        (tmp_path / "theirs" / "vocab.json").write_text(json.dumps(vocab))
    out, demos = str(tmp_path / "out"), tmp_path / "demos.jsonl"
    records = [dict(prompt=f"{i} and {i} make", response=f" {2 * i}") for i in range(30)]
    demos.write_text("\n".join(map(json.dumps, records)))
    cfg = SFTConfig(out=out, data=[str(demos)], init=init, steps=2, device="cpu", dtype="float32")
    train_sft.main(cfg)

    ours, theirs = GPT.load(out), transformers.AutoModelForCausalLM.from_pretrained(out)
    assert ours.config.vocab_size == theirs.config.vocab_size == tok.vocab_size == 50258
    tokens = torch.tensor([tok.encode("2 and 2 make 4")])
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)
        moved = ours(tokens)[..., :50257] - published(tokens).logits
    assert 0 < moved.abs().max() < 1  # two steps away from where it began
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == 50258

    cfg = evaluate.EvaluateConfig(
        policy=out, against=init, prompts=2, max_new_tokens=4, device="cpu"
    )
    evaluate.main(cfg)
    assert "over 2 held-out prompts" in capsys.readouterr().out


def test_models_with_two_vocabularies_cannot_be_compared(tmp_path):
    for name, text in ("a", "ab ab"), ("b", "cd cd"):
        tokenizer.learn([text], 259).save(tmp_path / name)
        GPT(GPTConfig(259, 12, 1, 1, 4)).save(tmp_path / name)
    cfg = evaluate.EvaluateConfig(
        policy=str(tmp_path / "a"), against=str(tmp_path / "b"), device="cpu"
    )
    with pytest.raises(UserError, match="expected two models with one tokenizer"):
        evaluate.main(cfg)
