"""Pictures show what was logged, one colour for each metric, in small files, without pyplot."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from matplotlib.text import Text

from nanorlhf.support import UserError, plotting
from nanorlhf.support.plotting import COLOURS, curves, small_multiples
from notebooks import drawing
from notebooks.drawing import plot_guess, strips

PNG = b"\x89PNG"


def token_strip(pieces, rows, title=""):
    return strips([pieces], [rows], [title])


def write_log(folder, rows):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(dict(step=i, **row)) + "\n" for i, row in enumerate(rows)]
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that curves makes before they are saved."""
    figures = []

    def keep(panels):
        figures.append(small_multiples(panels))
        return figures[-1]

    monkeypatch.setattr(plotting, "small_multiples", keep)
    return figures


def test_curves_draws_what_the_log_has_and_leaves_out_the_rest(tmp_path, drawn):
    write_log(tmp_path, [dict(score=0.1, kl=0.0), dict(score=0.2), dict(score=0.4, kl=3.0)])
    panels = [
        ("Score", "points", ["score", "gold"]),
        ("Gone", "", ["x"]),
        ("Drift", "nats", ["kl"]),
    ]
    assert curves(tmp_path, panels) == tmp_path / "curves.png"
    score, drift = drawn[0].axes
    assert (score.get_title("left"), drift.get_title("left")) == ("Score", "Drift")
    assert (drift.get_ylabel(), drift.get_xlabel()) == ("nats", "step")
    assert [line.get_label() for line in score.lines] == ["score"]
    assert drift.lines[0].get_xydata().tolist() == [[0, 0], [2, 3]]  # not every step measures it


def test_a_name_has_its_colour_wherever_it_stands(tmp_path, drawn):
    write_log(tmp_path, [dict(kl=1.0, score=1.0)])
    curves(tmp_path, [("", "", ["kl", "score"]), ("", "", ["score", "kl"])])
    colours = [{line.get_label(): line.get_color() for line in ax.lines} for ax in drawn[0].axes]
    assert colours[0] == colours[1] == {name: COLOURS[name] for name in ("kl", "score")}


def test_a_long_line_is_smoothed_without_bending_its_ends():
    steps = list(range(100))
    noisy = [5 + (-1) ** i for i in steps]
    raw, smooth = small_multiples([("", "", [("kl", "red", steps, noisy)])]).axes[0].lines
    assert list(raw.get_ydata()) == noisy
    assert np.abs(smooth.get_ydata() - 5).max() < 0.25
    _, flat = small_multiples([("", "", [("kl", "red", steps, [5.0] * 100)])]).axes[0].lines
    assert np.allclose(flat.get_ydata(), 5)


def test_a_single_step_is_still_seen():
    (line,) = small_multiples([("", "", [("kl", "red", [0], [1.0])])]).axes[0].lines
    assert line.get_marker() == "."


def test_curves_of_a_long_run_are_a_small_file(tmp_path):
    noise = np.random.default_rng(0).normal(size=(1000, 9))
    names = [f"m{i}" for i in range(9)]
    write_log(tmp_path, [dict(zip(names, row, strict=True)) for row in noise.tolist()])
    data = curves(tmp_path, [(name, "nats", [name]) for name in names]).read_bytes()
    assert data.startswith(PNG) and len(data) < 150_000


def test_a_log_that_is_cut_or_empty_is_drawn_and_one_that_is_missing_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "kl": 1.0}\n{"step": 1, "k')
    assert plotting.history(tmp_path) == {"kl": [(0, 1.0)]}
    (tmp_path / "log.jsonl").write_text("")
    assert curves(tmp_path, [("KL", "nats", ["kl"])]).read_bytes().startswith(PNG)
    with pytest.raises(UserError, match="nowhere.log.jsonl"):
        curves(tmp_path / "nowhere", [])


def test_without_panels_every_metric_has_one(tmp_path, drawn):
    write_log(tmp_path, [dict(kl=1.0, grad_norm=2.0)])
    assert curves(tmp_path) == tmp_path / "curves.png"
    kl, grad_norm = drawn[0].axes
    assert kl.lines[0].get_color() == COLOURS["kl"] and kl.get_legend() is None
    assert grad_norm.get_title("left") == "grad norm"


def test_importing_leaves_the_backend_to_the_caller():
    code = "import sys, nanorlhf.support.plotting; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = plotting.Path(plotting.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def words(fig):
    return [text.get_text() for text in fig.findobj(Text) if text.get_text()]


def cells(fig):
    """{(row, column): colour}, counted from the top left."""
    patches = fig.axes[0].patches
    xs, ys = (
        sorted({get(p) for p in patches}) for get in (lambda p: p.get_x(), lambda p: p.get_y())
    )
    return {(ys.index(p.get_y()), xs.index(p.get_x())): to_hex(p.get_facecolor()) for p in patches}


def test_a_strip_shows_every_token_and_every_number():
    rows = dict(logprob=[-0.5, -1.25, -3.0], advantage=torch.tensor([0.0, 12.0, -0.001]))
    shown = words(token_strip(["Dear", " Ada", "\n"], rows, "A letter"))
    for word in ("A letter", "Dear", "·Ada", "⏎", "logprob", "advantage", "±3.00", "±12.0"):
        assert word in shown
    assert [w for w in shown if w in ("-0.50", "-1.25", "-3.00")] == ["-0.50", "-1.25", "-3.00"]
    assert shown.count("0.0") == 2 and "-0.0" not in shown


def test_blue_is_above_zero_red_below_white_is_zero_and_grey_is_nothing():
    fig = token_strip(list("abcde"), dict(kl=[2.0, -2.0, 0.0, float("nan"), 1.0]))
    blue, red, white, grey, half = (cells(fig)[0, i] for i in range(5))
    assert (blue, red, white, grey) == ("#2b6cb0", "#c8453b", "#fbfaf7", drawing.PALE)
    assert to_rgba(blue)[0] < to_rgba(half)[0] < to_rgba(white)[0]
    assert "nan" not in words(fig)


def test_each_quantity_has_its_own_scale_shared_by_all_responses():
    first, second = dict(kl=[4.0], value=[0.1]), dict(kl=[2.0], value=[0.1])
    drawn = cells(strips([["a"], ["a"]], [first, second], ["one", "two"]))
    assert drawn[1, 0] == drawn[3, 0] == "#2b6cb0"  # 0.1 is all there is of value
    assert drawn[0, 0] == "#2b6cb0" != drawn[2, 0]  # 2 is half of the largest kl


def test_rows_of_the_same_kind_share_a_scale():
    drawn = cells(token_strip(["a"], dict(old_logprobs=[-4.0], ref_logprobs=[-2.0])))
    assert drawn[0, 0] == "#c8453b" != drawn[1, 0]  # -2 is half of the largest log-prob


def test_a_dashed_line_is_drawn_and_may_leave_the_panel():
    log = [dict(kl=x, kl_k3=100 * x) for x in (0.0, 1.0)]
    [ax] = drawing.dashboards({"a": log}, [], dict(kl=("KL", "nats", "kl_k3"))).axes
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    assert ax.lines[1].get_ydata()[1] == 100 and ax.get_ylim()[1] < 2


@pytest.mark.parametrize("length", [0, 1, 17, 128])
def test_a_strip_of_any_length_stays_inside_the_picture(length):
    pieces = [" word" if i % 3 else "x" * (5 * i) for i in range(length)]
    numbers = np.linspace(-99, 99, length)
    fig = token_strip(pieces, dict.fromkeys(["logprob", "kl", "value", "reward"], numbers))
    data = fig.png()
    width, height = fig.get_size_inches() * 72
    spans = sorted((p.get_y(), p.get_x(), p.get_x() + p.get_width()) for p in fig.axes[0].patches)
    assert len(spans) == 4 * length and len(data) < 100_000
    assert all(0 <= y < height - drawing.ROW and end < width for y, _, end in spans)
    for (y, _, end), (next_y, begin, _) in zip(spans, spans[1:], strict=False):
        assert next_y > y or begin >= end  # no cell lies on its neighbour


def test_no_token_can_spoil_the_picture():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = token_strip(["$x^$", "\\frac", "\x00\r\t", "a$", "<b>", ""], dict(kl=[0.0] * 6))
        assert fig.png().startswith(PNG)
    assert "$x^$" in words(fig)


def test_a_notebook_shows_the_figure_by_itself():
    assert token_strip(["a"], dict(kl=[1.0]))._repr_png_().startswith(PNG)


def test_a_guess_stands_beside_the_truth():
    fig = plot_guess(dict(score=0.5, kl_after_20_steps=5.0), dict(score=0.8, kl_after_20_steps=2.0))
    score, kl = fig.axes
    assert [bar.get_height() for bar in score.patches] == [0.5, 0.8]
    assert [bar.get_height() for bar in kl.patches] == [5.0, 2.0]
    assert kl.get_title("left") == "kl after 20 steps"
    assert fig.png().startswith(PNG)
