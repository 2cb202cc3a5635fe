"""The fast forms give what the plain ones of the course give, to the bit."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanorlhf import generate
from nanorlhf.logprobs import entropy, token_logprobs
from nanorlhf.model import GPT, GPTConfig, KVCache
from nanorlhf.support import fast

# --- a few rows at a time ---

V = 300_000  # so long that six rows are cut into two chunks


def values_and_gradient(at_a_time, name, dtype, temperature):
    """What is said of six rows of logits (2, 3, V), and where it pushes them."""
    torch.manual_seed(0)
    logits, chosen = torch.randn(2, 3, V, dtype=dtype) * 3, torch.randint(V, (2, 3))
    chosen[0, 1] = logits[0, 1].argmax()  # one that is likely, too
    logits[0, 1, chosen[0, 1]] += 12
    push = torch.randn(2, 3, dtype=dtype)
    logits.requires_grad_()
    function, others = dict(logprobs=(token_logprobs, [chosen]), entropy=(entropy, []))[name]
    if at_a_time:
        said = fast.rows_at_a_time(function, logits, *others, temperature=temperature)
    else:
        said = function(logits, *others, temperature)
    (said * push).sum().backward()
    return said.detach(), logits.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["logprobs", "entropy"])
def test_a_few_rows_at_a_time_say_and_learn_what_all_at_once_do(name, dtype, temperature):
    """To the bit: each row is computed by itself, in the same operations."""
    assert len(list(fast.chunks(torch.empty(6, V)))) == 2  # three rows, and three
    said, gradient = values_and_gradient(True, name, dtype, temperature)
    plain, plain_gradient = values_and_gradient(False, name, dtype, temperature)
    assert said.dtype == plain.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype and said.shape == (2, 3)
    assert torch.equal(said, plain) and torch.equal(gradient, plain_gradient)
    assert gradient.abs().max() > 1e-3 and said.std() > 0.1


def test_the_gradient_of_log_probs_is_that_of_their_differences(monkeypatch):
    monkeypatch.setattr(fast, "rows_in_chunk", lambda logits: 4)  # six rows: four, and two
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.randint(5, (2, 3))

    def rows_at_a_time(x):
        return fast.rows_at_a_time(token_logprobs, x, chosen, temperature=0.7)

    assert torch.autograd.gradcheck(rows_at_a_time, logits)


def test_log_probs_keep_no_second_copy_of_the_logits():
    logits, kept = torch.randn(64, 30_000).bfloat16().requires_grad_(), {}

    def keep(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    held = []
    for say in (lambda *x: fast.rows_at_a_time(token_logprobs, *x), token_logprobs):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            said = say(logits, torch.zeros(64, dtype=torch.long))
        assert said.shape == (64,)
        held.append(sum(kept.values()) / logits.nbytes)
    assert held[0] < 1.01 and held[1] > 2  # the plain form keeps one of twice the size


def test_the_chunks_are_all_rows_in_their_order():
    rows, others = torch.arange(7)[:, None].expand(7, 2**19), torch.arange(7)
    parts = [(x[:, 0].tolist(), y.tolist()) for x, y in fast.chunks(rows, others)]
    assert parts == [([0, 1],) * 2, ([2, 3],) * 2, ([4, 5],) * 2, ([6],) * 2]


# --- many steps ---

PROMPTS = [[1], [2, 4, 5, 6, 3, 1, 1], [6, 7], [8, 0, 1, 2]] * 6
EOS, PAD = 9, 10


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=11, n_positions=48, n_layer=2, n_head=2, n_embd=16)).eval()


def written(monkeypatch, model, decode, R, temperature, ending):
    """What generate writes with this decode, if the end is so much likelier than it would be."""
    uniforms = torch.rand(24, R, generator=torch.Generator().manual_seed(1)).double()
    tempting = ending * torch.eye(11)[EOS]
    with monkeypatch.context() as patch:
        patch.setattr(fast, "decode", decode)
        patch.setattr(model, "head", lambda hidden: GPT.head(model, hidden) + tempting)
        return generate.generate(model, PROMPTS, R, temperature, EOS, PAD, uniforms=uniforms)


def plainly(sample, *everything_else):
    assert sample is generate.sample
    generate.decode(*everything_else)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("ending", [-9.0, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("R", [1, 2, 8, 9, 40])
def test_decode_writes_what_the_plain_loop_writes(monkeypatch, model, R, ending, temperature):
    rows, real = [], fast.Decoder.step
    plain = written(monkeypatch, model, plainly, R, temperature, ending)
    monkeypatch.setattr(
        fast.Decoder, "step", lambda self: rows.append(len(self.rows)) or real(self)
    )
    ours = written(monkeypatch, model, fast.decode, R, temperature, ending)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    assert len(rows) <= R - 1 and rows == sorted(rows, reverse=True)
    if ending < 0:  # nothing ends
        assert rows == [24] * (R - 1) and plain[2].all()
    if R == 40 and temperature and ending in (0, 1):
        assert rows[0] == 24 > rows[-1] > 0  # rows that had ended were dropped on the way
    if R == 40 and ending == 9:
        assert rows == [24] * 7  # all had ended, and it stopped where it looked first


# --- a step that can be captured ---


def decoder_on(model, device):
    """Three rows with prompts of one, three and two tokens."""
    tokens = torch.full((3, 12), PAD, device=device)
    uniforms = torch.empty(3, 9, dtype=torch.float64, device=device).fill_(0.5)
    cache = KVCache(model.config, 3, 12, device, torch.float32)
    prompt_len = torch.tensor([1, 3, 2], device=device)
    settings = cache, tokens, prompt_len, uniforms, 1.0, EOS, PAD
    return fast.Decoder(generate.sample, model.to(device), *settings)


@torch.no_grad()
def test_a_step_asks_the_device_nothing(model):
    """Tensors on the meta device have no data: whoever asks for it, or mixes devices, is told."""
    decoder = decoder_on(model, "meta")
    decoder.choose(torch.zeros(3, 16, device="meta"))
    decoder.step()
    with pytest.raises(RuntimeError, match="meta"):
        bool(decoder.alive.any())


@torch.no_grad()
def test_a_step_changes_its_rows_in_place(model):
    decoder = decoder_on(model, "cpu")
    decoder.choose(torch.zeros(3, 16))
    changing = ["token", "at", "r", "alive", "tokens", "rows", "uniforms"]
    before = {name: getattr(decoder, name).data_ptr() for name in changing}
    at, keys = decoder.at.clone(), [k.data_ptr() for k in decoder.cache.k]
    for _ in range(2):
        decoder.step()
    assert {name: getattr(decoder, name).data_ptr() for name in changing} == before
    assert [k.data_ptr() for k in decoder.cache.k] == keys
    assert (decoder.at - at).tolist() == [2, 2, 2] and decoder.r.tolist() == [3]


def test_shapes_stay_as_they_are_where_a_new_one_is_dear(model, monkeypatch):
    uniforms = torch.rand(24, 20, generator=torch.Generator().manual_seed(1)).double()
    asked = (PROMPTS, 20, 1.0, EOS, PAD, 1, uniforms)
    shapes, plain = set(), generate.generate(model, *asked)

    def step(decoder, real=fast.Decoder.step):
        shapes.add((*decoder.token.shape, *decoder.cache.k[0].shape))
        real(decoder)

    monkeypatch.setattr(fast.Decoder, "step", step)
    generate.generate(model, *asked)
    assert len(shapes) > 1  # on a CPU, rows that have ended are dropped
    shapes.clear()
    model.compiled = True
    compiled = generate.generate(model, *asked)
    assert shapes == {(24, 24, 2, 64, 8)}
    for ours, theirs in zip(plain, compiled, strict=True):
        assert torch.equal(ours, theirs)


class Recorded:
    """What stands for a CUDA graph where there is none: it runs the step that it was given."""

    def __init__(self, step, pool):
        self.replay, self.pool = step, lambda: "its memory"


def as_captured(monkeypatch, model, graphs):
    """Decoding as on a GPU. Each graph adds to `graphs` whose memory it uses."""

    def capture(step, pool):
        graphs.append(pool)
        return Recorded(step, pool)

    model.compiled = True  # the cache then ends at a multiple of 64
    monkeypatch.setattr(torch.nn.Module, "compile", lambda trunk: None)
    monkeypatch.setattr(fast, "captures", lambda model: True)
    monkeypatch.setattr(fast, "capture", capture)


def test_what_is_captured_is_kept_and_goes_on_with_other_rows_and_weights(model, monkeypatch):
    def sampled(prompts, R, temperature=1.0):
        uniforms = torch.rand(len(prompts), R, generator=torch.Generator().manual_seed(1)).double()
        return generate.generate(model, prompts, R, temperature, EOS, PAD, uniforms=uniforms)

    longer, graphs, found = [[*p, 3] for p in PROMPTS[::-1]], [], []
    for captures in False, True:
        if captures:
            as_captured(monkeypatch, model, graphs)
        for step, prompts, R in (0, PROMPTS, 9), (1, longer, 9), (2, longer, 20), (3, PROMPTS, 9):
            torch.manual_seed(step)
            for w in model.parameters():  # as an optimizer changes them
                w.data.copy_(torch.randn_like(w) / 3)
            found.append(sampled(prompts, R))
            if step == 1 and captures:
                assert len(graphs) == 1  # one for both, though the longest prompts differ
    for ours, theirs in zip(found[:4], found[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert graphs == [[]] * 3  # other lengths need another decoder, and the last one alone is kept
    before = model.captured
    sampled(PROMPTS, 9)
    assert model.captured is before and "captured" not in str(model.state_dict().keys())
    assert copy.deepcopy(model).captured is None
    sampled(PROMPTS, 9, temperature=0.7)  # which stands in a graph as a number
    assert model.captured is not before


def test_a_graph_for_every_64_positions_reads_the_filled_ones_and_shares_its_memory(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, n_positions=200, n_layer=1, n_head=2, n_embd=16)).eval()
    uniforms, graphs, read = torch.rand(3, 150).double(), [], []
    asked = ([[1] * 40, [2, 3]] + [[4] * 7], 150, 1.0, None, PAD, 1, uniforms)
    plain = generate.generate(model, *asked)
    as_captured(monkeypatch, model, graphs)

    def step(decoder, real=fast.Decoder.step):
        read.append((decoder.cache.filled, int(decoder.at.max()) + 1))
        real(decoder)

    monkeypatch.setattr(fast.Decoder, "step", step)
    captured = generate.generate(model, *asked)
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert graphs == [[], ["its memory"], ["its memory"]]
    assert sorted({n for n, _ in read}) == [64, 128, 192] and len(read) == 149
    assert all(seen <= filled <= seen + 64 for filled, seen in read)


def test_a_copy_to_sample_from_says_what_autocast_says():
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(11, 9, 2, 2, 16)).eval(), torch.randint(11, (5, 9))
    other = fast.cast(model, torch.bfloat16)
    kinds = {name: w.dtype for name, w in other.named_parameters()}
    matrices = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert {name for name in kinds if ".ln_" in name or ".wpe." in name} == {*kinds} - matrices
    with torch.no_grad():
        exact = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = other(tokens), model(tokens)
    lost, autocast_lost = ((x - exact).norm() / exact.norm() for x in (ours, theirs))
    assert 1e-4 < lost < 1.5 * autocast_lost
    assert all(w.requires_grad and w.dtype == torch.float32 for w in model.parameters())


class Casts(TorchDispatchMode):
    """Counts how often a matrix of the model is turned into another format."""

    def __init__(self, model):
        super().__init__()
        self.shapes, self.n = {w.shape for w in model.parameters() if w.dim() == 2}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_steps(model):
    """Autocast keeps what it casts while its context lasts. For frozen weights it does not."""
    casts = []
    for R in 3, 9:
        with Casts(model) as counted:
            generate.generate_rows(model, PROMPTS, R, -1, PAD, dtype="bfloat16")
        casts.append(counted.n)
    assert casts[0] == casts[1] == 2 * 4 + 1  # four in each layer, and the head


# --- how many at once ---


def test_long_rows_of_a_large_model_are_answered_few_at_a_time():
    tiny = GPTConfig(vocab_size=12, n_positions=64, n_layer=2, n_head=2, n_embd=16)
    assert fast.rows_that_fit(tiny, 64) == 500
    # Keys and values; and the logits in float32 with what the sampler makes of them, the cumulative
    # sum in float64 included.
    row = 2 * 4 * 2 * 16 * 64 + 5 * 4 * 12
    assert fast.rows_that_fit(tiny, 64, memory=7.5 * row) == 7
    assert fast.rows_that_fit(tiny, 64, memory=row / 2) == 1
    assert fast.rows_that_fit(tiny, 64, most=20) == 20
