"""What a GPU has to show. Without one these tests run on the CPU, as far as that makes sense.

    python -m pytest -q -m device tests/test_device.py
"""

import copy
import dataclasses
from contextlib import suppress

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanorlhf import generate, ppo, sft
from nanorlhf.attention import attend_fused, attend_plain
from nanorlhf.logprobs import (
    entropy,
    response_logits,
    response_logprobs,
    response_tokens,
    token_logprobs,
)
from nanorlhf.model import GPT, GPTConfig, KVCache, ScalarGPT
from nanorlhf.support import fast
from nanorlhf.support.config import autocast, compile_trunks, run
from nanorlhf.support.data import collate
from nanorlhf.support.runlog import RunLog

pytestmark = pytest.mark.device
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])

V, EOS, PAD = 50_257, 9, 10  # as many tokens as GPT-2 has
TINY = GPTConfig(vocab_size=11, n_positions=160, n_layer=2, n_head=2, n_embd=32)
PROMPTS = [[1], [2, 4, 5, 6, 3, 1, 1], [6, 7], [8, 0, 1, 2]] * 6
LOST = dict(float32=1e-5, bfloat16=2e-2)  # of what a computation has to lose, relative


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32, which another test's setup() may have turned on: float32 then means float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def models(device, config=TINY, dropout=0.0):
    """A policy, its reference and a critic, all weights random."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, dropout=dropout)
    policy, critic = GPT(config), ScalarGPT(config)
    with torch.no_grad():
        for w in (*policy.parameters(), *critic.parameters()):
            w += 0.1 * torch.randn_like(w)
    policy, critic = policy.to(device).eval(), critic.to(device).eval()
    return policy, copy.deepcopy(policy).requires_grad_(False), critic


def lost(found, exact):
    return ((found.cpu().double() - exact.cpu().double()).norm() / exact.norm().cpu()).item()


# --- every fast form and its plain twin ---


def attended(form, given, masked, dtype, device):
    """What comes out of one form of attention, and what flows back to q, k and v."""
    q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in given)
    mask = None
    if masked:  # 70 tokens that stand behind 58 in a cache
        mask = torch.arange(128, device=device) <= torch.arange(58, 128, device=device)[:, None]
    out = form(q, k, v, mask)
    out.square().sum().backward()
    return out.detach(), q.grad, k.grad, v.grad


@dtypes
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_plain_one(device, dtype, masked):
    torch.manual_seed(0)
    given = [torch.randn(2, 3, n, 32) for n in (70, *[128 if masked else 70] * 2)]
    given, dtype, limit = [x.bfloat16() for x in given], getattr(torch, dtype), LOST[dtype]
    exact = attended(attend_plain, given, masked, torch.float64, "cpu")
    for form in attend_plain, attend_fused:
        found = attended(form, given, masked, dtype, device)
        assert max(map(lost, found, exact)) < limit


@dtypes
@pytest.mark.parametrize("function", [token_logprobs, entropy])
def test_a_few_rows_at_a_time_are_all_rows(device, dtype, function):
    """Of GPT-2's vocabulary, in so many rows that they are cut."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(400, V)).to(device, getattr(torch, dtype)).requires_grad_()
    others = [torch.randint(V, (400,), device=device)] * (function is token_logprobs)
    assert len(list(fast.chunks(logits))) > 1
    found = []
    for said in fast.rows_at_a_time(function, logits, *others), function(logits, *others):
        found.append((said.detach(), *torch.autograd.grad(said.sum(), logits)))
    for ours, plain in zip(*found, strict=True):
        assert lost(ours, plain.double()) < dict(float32=1e-6, bfloat16=1e-4)[dtype]
        assert ours.abs().max() > 0.1


@dtypes
@torch.no_grad()
def test_with_and_without_a_cache_the_trunk_says_the_same(device, dtype):
    policy, _, _ = models(device)
    tokens, positions = (x.to(device) for x in (torch.randint(11, (3, 90)), torch.arange(90)))
    exact = policy.transformer(tokens)
    with autocast(device, dtype):
        cache = KVCache(TINY, 3, 128, device, fast.computed_dtype(policy))
        found, at = [], positions.expand(3, 90)
        for begin, end, cache.filled in (0, 60, 60), (60, 61, 64), (61, 90, 128):
            part = slice(begin, end)
            found.append(policy.transformer(tokens[:, part], cache, at[:, part]))
    assert lost(torch.cat(found, 1), exact) < LOST[dtype]


def sampled(policy, dtype="float32", R=100, prompts=PROMPTS, eos=None, temperature=1.0):
    """-> tokens, prompt_len, mask, and the random numbers they were drawn with"""
    uniforms = generate.draw_uniforms(len(prompts), R, rng=torch.Generator().manual_seed(1))
    with autocast(policy.device, dtype):
        settings = R, temperature, eos, PAD, 1, uniforms
        return *generate.generate(policy, prompts, *settings), uniforms


def plainly(*given, **settings):
    """The same, by the loop that is written in the course."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "decode", lambda sample, *others: generate.decode(*others))
        return sampled(*given, **settings)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def assert_explained(policy, dtype, tokens, prompt_len, mask, uniforms):
    """Each token is the one at which the probabilities that a scorer adds up reach its number. In
    bfloat16 a number near a border may fall to either side: then two samplers part for good, and
    comparing their texts would say nothing."""
    policy, (tokens, prompt_len, mask) = copy.deepcopy(policy).cpu(), (
        x.cpu() for x in (tokens, prompt_len, mask))  # fmt: skip
    R = mask.shape[1]
    p = response_logits(policy, tokens, prompt_len, R).double().softmax(-1)
    chosen = response_tokens(tokens, prompt_len, R)[..., None]
    upper = p.cumsum(-1).gather(-1, chosen)[..., 0]
    lower = upper - p.gather(-1, chosen)[..., 0]
    gap = torch.maximum(lower - uniforms[:, :R], uniforms[:, :R] - upper)[mask]
    assert gap.max() < dict(float32=1e-4, bfloat16=0.1)[dtype]
    assert (gap > 1e-3).float().mean() < 0.05 and mask.sum() > 100


@dtypes
@pytest.mark.parametrize("eos", [None, EOS])
def test_every_token_is_the_one_that_its_random_number_points_at(device, dtype, eos):
    policy, _, _ = models(device)
    assert_explained(policy, dtype, *sampled(policy, dtype, eos=eos))


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_decoding_writes_what_the_plain_loop_writes(device, eos, temperature):
    policy, _, _ = models(device)
    settings = dict(eos=eos, temperature=temperature)
    assert same(sampled(policy, **settings), plainly(policy, **settings))


# --- steps that are captured ---


@pytest.fixture
def captured(monkeypatch, device):
    """Decoding steps as CUDA graphs, and the models not compiled, which takes long. Without CUDA
    each step of a graph is the step it was made of."""
    if device.type != "cuda":
        graph = torch.no_grad()  # any object that takes attributes
        graph.pool = lambda: None
        monkeypatch.setattr(
            fast, "capture", lambda step, pool: setattr(graph, "replay", step) or graph
        )
        monkeypatch.setattr(torch.nn.Module, "compile", lambda trunk: None)
        monkeypatch.setattr(GPT, "compiled", True)  # as to shapes
    monkeypatch.setattr(fast, "captures", lambda model: True)


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_captured_step_writes_token_by_token_what_the_plain_one_writes(
        device, captured, eos, temperature):  # fmt: skip
    policy, _, _ = models(device)
    settings = dict(eos=eos, temperature=temperature)
    assert same(sampled(policy, **settings), plainly(policy, **settings))
    assert policy.captured.graphs.keys() >= {64}


@dtypes
def test_captured_steps_follow_the_weights_and_take_other_prompts(device, captured, dtype):
    policy, _, _ = models(device)
    assert_explained(policy, dtype, *sampled(policy, dtype))
    kept = policy.captured
    with torch.no_grad():
        for w in policy.parameters():
            w += 0.2 * torch.randn_like(w)  # in place, as an optimizer does
    other = [[3, *prompt] for prompt in PROMPTS[::-1]]  # longer ones
    assert_explained(policy, dtype, *sampled(policy, dtype, prompts=other))
    assert policy.captured is kept and kept.graphs.keys() == {64, 128}


@cuda_only
@dtypes
def test_no_step_waits_for_the_host(device, dtype):
    """PyTorch raises an error where one would."""
    policy, reference, critic = models(device)
    cfg = config(dtype)
    tokens = torch.zeros(24, 64, dtype=torch.long, device=device)
    at, u = tokens.sum(1) + 3, torch.full((24, 20), 0.5, dtype=torch.float64, device=device)
    rollout = ppo.collect(policy, reference, critic, length, PROMPTS, cfg, 0.1, EOS, PAD)
    optimizers = ppo.make_optimizers(policy, critic, cfg)
    ppo.update(policy, critic, optimizers, rollout, cfg)  # makes what is made only once
    with torch.no_grad(), autocast(device, dtype):
        cache = KVCache(TINY, 24, 64, device, fast.computed_dtype(policy))
        decoder = fast.Decoder(generate.sample, policy, cache, tokens, at, u, 1.0, EOS, PAD)
        for mode in 0, "error":
            torch.cuda.set_sync_debug_mode(mode)
            try:
                decoder.step()
            finally:
                torch.cuda.set_sync_debug_mode(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ppo.step(policy, critic, optimizers, rollout, cfg)
    finally:
        torch.cuda.set_sync_debug_mode(0)


@cuda_only
@torch.no_grad()
def test_training_and_prompts_take_the_flash_kernel(device):
    """With no other allowed, PyTorch raises an error where it cannot be used."""
    policy, _, _ = models(device)
    tokens, at = torch.randint(11, (2, 3, 70), device=device)[0], torch.arange(70, device=device)
    cache = KVCache(TINY, 3, 128, device, torch.bfloat16)
    cache.filled = 70
    with autocast(device, "bfloat16"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.enable_grad():
            policy.transformer(tokens).sum().backward()
        policy.transformer(tokens, cache, at.expand(3, 70))


@cuda_only
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_learns_and_writes_the_same(device):
    """On a CPU, see test_twins.py."""
    (policy, twin, _), dtype = models(device), "bfloat16"
    tokens, learnt = torch.randint(11, (4, 40), device=device), []
    twin.requires_grad_(True)
    compile_trunks(True, policy)
    assert policy.compiled
    for model in twin, policy:
        with autocast(device, dtype):
            model(tokens).float().log_softmax(-1)[..., 3].mean().backward()
        learnt.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    assert lost(learnt[1], learnt[0]) < 2 * LOST[dtype]
    assert_explained(twin, dtype, *sampled(policy, dtype))
    assert policy.captured.graphs.keys() == {64, 128}
    torch._dynamo.reset()


# --- learning ---


def config(dtype="float32", **changes):
    return ppo.PPOConfig(
        batch_size=24, minibatches=2, epochs=2, max_new_tokens=20, dtype=dtype, warmup=0, **changes
    )


def length(tokens, prompt_len, mask):
    return mask.sum(1).float()


@dtypes
def test_a_round_with_gpt2s_vocabulary(device, dtype):
    """The ratio starts at 1, or update() raises; what was drawn is what the scorer says."""
    wide = dataclasses.replace(TINY, vocab_size=V, n_layer=1)
    policy, reference, critic = models(device, wide)
    cfg = config(dtype)
    prompts = [[V - 1 - token for token in prompt] for prompt in PROMPTS]
    rollout = ppo.collect(policy, reference, critic, length, prompts, cfg, 0.1, EOS, PAD)
    assert rollout.tokens.max() > 45_000 and rollout.mask.sum() > 400
    metrics = ppo.update(policy, critic, ppo.make_optimizers(policy, critic, cfg), rollout, cfg)
    assert all(x == x for x in metrics.values()) and metrics["approx_kl"] > 0
    assert rollout.tokens.device.type == policy.device.type == device.type


def test_every_token_of_gpt2s_vocabulary_can_be_drawn(device):
    """Of all alike, the number in the middle of a token's share draws it."""
    if device.type == "mps":
        pytest.skip("MPS has no float64, and float32 is too coarse for this")
    token = torch.tensor([0, 1, 17, 25_000, V - 2, V - 1], device=device)
    u = ((token.double() + 0.5) / V)[:, None]
    assert generate.sample(torch.zeros(6, V, device=device), 1.0, u).tolist() == token.tolist()


def test_micro_batches_change_only_the_rounding(device):
    rollout, found = None, []
    for size in 0, 5:
        policy, reference, critic = models(device)
        cfg = config(micro_batch_size=size)
        if rollout is None:
            rollout = ppo.collect(policy, reference, critic, length, PROMPTS, cfg, 0.1, EOS, PAD)
        optimizers = ppo.make_optimizers(policy, critic, cfg)
        ppo.step(policy, critic, optimizers, rollout, cfg)
        found.append([w.grad for model in (policy, critic) for w in model.parameters()])
    for ours, whole in zip(*found, strict=True):
        assert lost(ours, whole) < 1e-4


class Interrupted(RunLog):
    def write(self, step, **metrics):
        if step == 5:
            raise KeyboardInterrupt


def learn_sft(device, cfg, log):
    """Dropout draws from the random state of the device."""
    policy, _, _ = models(device, dropout=0.3)
    rows = [([*prompt, 1, 2, EOS], len(prompt)) for prompt in PROMPTS]
    sft.train(policy, rows, rows[:4], PAD, cfg, log)
    return [policy]


def learn_ppo(device, cfg, log):
    policy, reference, critic = models(device)
    ppo.train(policy, reference, critic, length, PROMPTS, EOS, PAD, cfg, log)
    return [policy, critic]


@dtypes
@pytest.mark.parametrize("learn", [learn_sft, learn_ppo])
def test_a_resumed_run_ends_with_the_very_same_weights(device, dtype, learn, tmp_path):
    common = dict(steps=8, save_every=3, out=str(tmp_path))
    cfg = config(dtype, **common)
    if learn is learn_sft:
        cfg = sft.SFTConfig(batch_size=6, dtype=dtype, warmup=0, **common)
    found = []
    for log, changes in (RunLog, {}), (Interrupted, {}), (RunLog, dict(resume=True)):
        torch.manual_seed(7 + len(found))  # a resumed run takes its random state from the save
        if not changes:
            torch.manual_seed(7)
        with suppress(KeyboardInterrupt):
            found.append(learn(device, dataclasses.replace(cfg, **changes), log(tmp_path)))
    for ours, whole in zip(found[-1], found[0], strict=True):
        assert same(ours.parameters(), whole.parameters())


# --- and the rest ---


def test_numbers_are_those_of_the_cpu(device):
    policy, _, _ = models(device)
    tokens, prompt_len, mask = collate([(p + [3, 4, EOS], len(p)) for p in PROMPTS], PAD, device)
    assert tokens.device.type == prompt_len.device.type == mask.device.type == device.type
    with torch.no_grad():
        found = response_logprobs(policy, tokens, prompt_len, 3)
        exact = response_logprobs(policy.cpu().double(), tokens.cpu(), prompt_len.cpu(), 3)
    assert lost(found, exact) < 1e-5 and mask.all()


def test_memory_that_runs_out_ends_in_one_sentence(device, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        run(lambda cfg: torch.empty(2**50, device=device), ppo.PPOConfig)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("out of memory") and said.count("\n") == 1
