"""One optimiser step by hand, the schedules, and what the loop around them keeps."""

import dataclasses
import math

import pytest
import torch

from nanorlhf.support import loop
from nanorlhf.support.config import TrainConfig
from nanorlhf.support.runlog import RunLog


@dataclasses.dataclass
class Config(TrainConfig):
    """A run of a few numbers."""

    out: str = ""
    steps: int = 4
    batch_size: int = 2


CFG = Config(device="cpu", dtype="float32", grad_clip=1e9, warmup=0)


def line(w=0.0):
    """A model of one weight."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, w)
    return model


def descent(model, lr=1.0):
    """The weight moves by the gradient, so that what it moved by is the gradient."""
    return torch.optim.SGD(model.parameters(), lr=lr)


# --- one step ---

# Rows (tokens, prompt_len). The loss is the mean over all tokens of (w - token)^2 / 2.
ROWS = [([1], 0), ([2] * 5, 0), ([6] * 2, 0), ([4], 0)]


def weight(rows):
    return sum(len(tokens) for tokens, _ in rows)


def loss_fn(model):
    def loss(rows):
        targets = torch.tensor([float(token) for tokens, _ in rows for token in tokens])
        mean = ((model.weight - targets) ** 2).mean() / 2
        return mean, dict(loss=mean, target=targets.mean())

    return loss


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 9])
def test_each_micro_batch_counts_by_its_share_of_the_tokens(size):
    model = line()
    cfg = dataclasses.replace(CFG, micro_batch_size=size)
    metrics = loop.step(loss_fn(model), ROWS, weight, dict(optimizer=descent(model)), cfg)
    mean = (1 + 10 + 12 + 4) / 9  # and not the mean of the rows, nor of the parts' means
    assert model.weight.item() == pytest.approx(mean)
    assert metrics["target"].item() == pytest.approx(mean)
    assert metrics["loss"].item() == pytest.approx((1 + 5 * 4 + 2 * 36 + 16) / 9 / 2)
    assert metrics["grad_norm"].item() == pytest.approx(mean) and metrics["lr"] == 1.0


@pytest.mark.parametrize("size", [0, 1])
def test_gradients_that_were_there_before_do_not_count(size):
    model = line()
    cfg = dataclasses.replace(CFG, micro_batch_size=size)
    model.weight.grad = torch.full((1, 1), 100.0)
    for expected in 3.0, 3.0:  # from 0 to the mean in one step, and there it stays
        loop.step(loss_fn(model), ROWS, weight, dict(optimizer=descent(model)), cfg)
        assert model.weight.item() == pytest.approx(expected)


def test_a_gradient_is_shortened_to_the_limit_and_logged_as_it_was():
    model = line()
    cfg = dataclasses.replace(CFG, grad_clip=0.25)
    metrics = loop.step(loss_fn(model), ROWS, weight, dict(optimizer=descent(model)), cfg)
    assert model.weight.item() == pytest.approx(0.25, rel=1e-4)
    assert metrics["grad_norm"].item() == pytest.approx(3.0)


def test_each_optimizer_makes_its_step_and_has_its_own_limit_and_names():
    policy, critic = line(), line()
    optimizers = dict(policy_optimizer=descent(policy, 1.0), critic_optimizer=descent(critic, 0.5))
    parts = dict(policy=policy, critic=critic) | optimizers

    def both(rows):
        losses = [loss_fn(model)(rows)[0] for model in (policy, critic)]
        return losses[0] + 2 * losses[1], dict(policy_loss=losses[0])

    metrics = loop.step(both, ROWS, weight, parts, dataclasses.replace(CFG, grad_clip=4.0))
    assert policy.weight.item() == pytest.approx(3.0)
    assert critic.weight.item() == pytest.approx(0.5 * 4.0, rel=1e-4)  # of a gradient of 6
    numbers = {name: float(x) for name, x in metrics.items()}
    assert numbers == pytest.approx(
        dict(policy_loss=(1 + 20 + 72 + 16) / 18, policy_grad_norm=3.0, critic_grad_norm=6.0,
             policy_lr=1.0, critic_lr=0.5)
    )  # fmt: skip


def test_metrics_carry_no_gradient():
    model = line()
    metrics = loop.step(loss_fn(model), ROWS, weight, dict(optimizer=descent(model)), CFG)
    assert not any(x.requires_grad for x in metrics.values() if isinstance(x, torch.Tensor))


def test_the_loss_is_computed_in_the_format_of_the_settings():
    model, formats = line(), []

    def loss(rows):
        formats.append(model(torch.ones(1, 1)).dtype)
        return loss_fn(model)(rows)

    for dtype in "float32", "bfloat16":
        cfg = dataclasses.replace(CFG, dtype=dtype)
        loop.step(loss, ROWS, weight, dict(optimizer=descent(model)), cfg)
    assert formats == [torch.float32, torch.bfloat16]


# --- schedules ---


def test_a_rate_falls_in_a_straight_line_to_zero():
    factors = [loop.linear(step, 8, 0) for step in range(8)]
    assert factors == pytest.approx([1 - i / 8 for i in range(8)])
    assert loop.linear(8, 8, 0) == 0


def test_it_rises_first_if_that_is_wanted():
    factors = [loop.linear(step, 8, 4) for step in range(8)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


def test_a_cosine_rises_in_a_straight_line_and_falls_to_a_tenth():
    factors = [loop.cosine(step, 14, 4) for step in range(15)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[9] == pytest.approx(0.55) and factors[14] == pytest.approx(0.1)
    assert factors[4] + factors[14] == pytest.approx(factors[6] + factors[12])  # symmetric
    falls = [a - b for a, b in zip(factors[4:], factors[5:])]
    assert min(falls) > 0 and max(falls) > 5 * falls[0]  # slowly at first: no straight line


def test_a_warm_up_longer_than_the_run_only_rises():
    assert [loop.cosine(step, 3, 5) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    assert loop.linear(0, 3, 5) == pytest.approx(0.2)


# --- the loop ---


def run(cfg, schedule=loop.linear, stop=None, **given):
    """A run, up to the step `stop`. -> the batches, the rates of each step, the model, the state"""
    model = line()
    rates = [dict(params=[model.weight], lr=0.1), dict(params=[torch.zeros(1).requires_grad_()])]
    parts = dict(model=model, optimizer=loop.adamw(rates, 0.01))
    state, batches, seen, log = dict(step=0, tokens=0), [], [], RunLog(cfg.out)
    for batch in loop.batches(ROWS, parts, schedule, cfg, log, state, **given):
        if state["step"] == stop:
            break
        assert log.batch == batch
        batches.append(batch)
        seen.append([group["lr"] for group in parts["optimizer"].param_groups])
        loop.step(loss_fn(model), batch, weight, parts, cfg)
        log.write(state["step"])
    return batches, seen, model, state


@pytest.mark.parametrize("schedule", [loop.linear, loop.cosine])
def test_every_rate_follows_the_schedule_from_the_rate_it_had(schedule):
    cfg = dataclasses.replace(CFG, steps=6, warmup=2)
    _, rates, _, state = run(cfg, schedule)
    factors = [schedule(step, 6, 2) for step in range(6)]
    assert torch.allclose(torch.tensor(rates), torch.tensor([[0.1 * f, 0.01 * f] for f in factors]))
    assert state["step"] == 6


def test_every_row_is_seen_once_an_epoch():
    batches, _, _, state = run(CFG)
    assert [len(batch) for batch in batches] == [2] * 4
    for epoch in batches[:2], batches[2:]:
        assert sorted(row for batch in epoch for row in batch) == sorted(ROWS)
    assert state == dict(step=4, tokens=2 * 9)


def test_a_batch_may_have_a_size_of_its_own():
    batches, *_ = run(CFG, batch_size=1)
    assert [len(batch) for batch in batches] == [1] * 4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_number_of_steps_is_one_pass(size):
    batches, rates, _, state = run(dataclasses.replace(CFG, steps=0, batch_size=size))
    steps = math.ceil(4 / size)
    assert sorted(row for batch in batches for row in batch) == sorted(ROWS)
    assert state["step"] == len(batches) == steps
    assert [rate for rate, _ in rates] == pytest.approx(
        [0.1 * (1 - i / steps) for i in range(steps)]
    )


def test_what_is_no_row_says_which_rows_it_holds():
    """A prompt, or a group of responses: its rows are counted, and kept for a step that fails."""
    prompts, log, state = [[1, 2], [3] * 5, [4], [5] * 4], RunLog(), dict(step=0, tokens=0)
    parts = dict(optimizer=loop.adamw(line().parameters(), 0.1))
    cfg, rows_of = dataclasses.replace(CFG, steps=2), lambda prompt: [(prompt, len(prompt))]
    source = loop.batches(prompts, parts, loop.linear, cfg, log, state, rows_of)
    seen = [(batch, log.batch) for batch in source]
    for batch, rows in seen:
        assert rows == [(prompt, len(prompt)) for prompt in batch]
    assert sorted(prompt for batch, _ in seen for prompt in batch) == sorted(prompts)
    assert state["tokens"] == 2 + 5 + 1 + 4


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path):
    cfg = dataclasses.replace(CFG, steps=6, save_every=2, out=str(tmp_path))
    whole, rates, model, state = run(cfg)
    assert len(run(cfg, stop=5)[0]) == 5
    rest, rates_again, again, state_again = run(dataclasses.replace(cfg, resume=True))
    assert rest == whole[4:] and rates_again == rates[4:] and state_again == state
    assert torch.equal(again.weight, model.weight) and model.weight.item() != 0


# --- the optimizer ---


def test_a_group_may_have_a_rate_and_a_decay_of_its_own():
    one, other = line(1.0), line(1.0)
    groups = [dict(params=one.parameters(), lr=0.5), dict(params=other.parameters())]
    optimizer = loop.adamw(groups, 0.1, weight_decay=0.2)
    for model in one, other:
        model.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert one.weight.item() == pytest.approx(1 - 0.5 * 0.2)
    assert other.weight.item() == pytest.approx(1 - 0.1 * 0.2)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 0.1]
