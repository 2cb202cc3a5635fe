"""Draws the log of a run as curves, and responses as strips of coloured tokens.

Input: the folder of a run, or tokens and the numbers that belong to them. Output: small PNG files,
in which a metric always has the same colour. Nothing here needs a display or touches pyplot, so the
backend that a notebook has chosen stays as it is.

    python -m nanorlhf.support.plotting out/ppo              draws out/ppo/curves.png again
    python -m nanorlhf.support.plotting out/ppo out/grpo     draws both runs into ./curves.png
"""

import argparse
import io
import itertools
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from nanorlhf.support import UserError, runlog

INK, GREY, PALE = "#22272e", "#8a9099", "#e9eaec"
COLOURS = dict(
    policy="#2b6cb0", reference="#8a9099", chosen="#2f9e62", rejected="#cf4a4a", margin="#8a6d3b",
    score="#159a9c", gold="#d9a00f", kl="#7d57b5", loss="#2b6cb0", policy_loss="#2b6cb0",
    value_loss="#e0701f", accuracy="#2f9e62", win_rate="#2f9e62", entropy="#b5527f",
)  # fmt: skip
OTHERS = ("#2b6cb0", "#e0701f", "#2f9e62", "#cf4a4a", "#7d57b5", "#159a9c", "#8a6d3b", "#b5527f")
UNITS = dict(
    loss="nats / token", perplexity="tokens", kl="nats / response", entropy="nats / token",
    response_len="tokens", accuracy="fraction", win_rate="fraction", clip_frac="fraction",
)  # fmt: skip


class Picture(Figure):
    """A Figure that a notebook shows when it is the value of a cell, without pyplot."""

    def png(self) -> bytes:
        """The picture as a PNG file of 128 colours, a third of the size of one with all colours."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, dpi=80)
        Image.open(full).convert("RGB").quantize(128).save(small, "png", optimize=True)
        return small.getvalue()

    _repr_png_ = png  # the method that notebooks call


def curves(folder: str | Path, panels: list[tuple] = ()) -> Path:
    """Draw the log of one run, one panel beside the other -> the path of its curves.png

    panels: list of (title, unit, [metric, ...]); none: one for each metric. Metrics that the log
    does not have are left out. Raises UserError where the folder has no log.
    """
    if not panels:
        return overlay([folder])
    log, drawn = history(folder), []
    for title, unit, names in panels:
        lines = [(name, colour(name, i), *log[name]) for i, name in enumerate(names) if name in log]
        if lines:
            drawn.append((title, unit, lines))
    path = Path(folder) / "curves.png"
    path.write_bytes(small_multiples(drawn).png())
    return path


def overlay(folders: list[str | Path]) -> Path:
    """Draw every metric that the runs share, one panel each -> the path of curves.png

    It is written into the folder of the run, or into the current folder if there are several runs.
    Raises UserError where a folder has no log.
    """
    logs = [history(folder) for folder in folders]
    panels = []
    for name in [name for name in logs[0] if all(name in log for log in logs)]:
        labels = [""] * len(logs) if panels else folders  # only the first panel has a legend
        colours = itertools.cycle(OTHERS) if len(logs) > 1 else [colour(name)]
        lines = [(label, c, *log[name]) for label, c, log in zip(labels, colours, logs)]
        panels.append((name.replace("_", " "), UNITS.get(name, ""), lines))
    path = Path(folders[0] if len(folders) == 1 else ".") / "curves.png"
    path.write_bytes(small_multiples(panels).png())
    return path


def history(folder: str | Path) -> dict[str, tuple[list, list]]:
    """log.jsonl -> {metric: (steps, values)}; not every line has every metric."""
    log = {}
    for row in runlog.read(folder):
        step = row.pop("step")
        for name, value in row.items():
            steps, values = log.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return log


def colour(name, number=0):
    """The colour of this metric, or for a metric that has none, the colour of this number."""
    return COLOURS.get(name, OTHERS[number % len(OTHERS)])


def small_multiples(panels: list[tuple]) -> Picture:
    """panels: list of (title, unit, [(label, colour, steps, values), ...]), up to three in a row"""
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    fig = Picture(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for number, (title, unit, lines) in enumerate(panels, 1):
        ax = fig.add_subplot(rows, columns, number, sharex=fig.axes[0] if fig.axes else None)
        for line in lines:
            draw_line(ax, *line)
        tidy(ax, title, unit, legend=len(lines) > 1 and lines[0][0])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if number > len(panels) - columns:
            ax.set_xlabel("step", fontsize=8, color=GREY)
    return fig


def draw_line(ax, label, colour, steps, values):
    """A line of 50 values or more is drawn twice: pale as it is, and on top its running mean."""
    if len(values) >= 50:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        window = np.ones(len(values) // 25 * 2 + 1)
        counts = np.convolve(np.ones(len(values)), window, "same")  # fewer at both ends
        values = np.convolve(values, window, "same") / counts
    marker = "." if len(values) < 20 else ""
    ax.plot(steps, values, color=colour, linewidth=1.6, marker=marker, label=label)


def tidy(ax, title, unit, legend=False):
    """The look that all panels share: few lines, small grey numbers."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    ax.set_ylabel(unit, fontsize=8, color=GREY)
    ax.tick_params(labelsize=8, colors=GREY, length=0)
    ax.grid(axis="y", color=PALE)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)
    if legend:
        ax.legend(fontsize=8, frameon=False, labelcolor=INK)


def growth(panels: list[tuple], unit: str) -> Picture:
    """panels: list of (title, sizes, {label: values}); both axes are logarithmic."""
    fig = Picture(figsize=(3.6 * len(panels), 2.8), layout="constrained")
    for ax, (title, sizes, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, (label, values) in enumerate(lines.items()):
            ax.plot(sizes, values, marker=".", label=label, color=OTHERS[number])
        ax.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
        ax.minorticks_off()
        tidy(ax, title, unit, legend=True)
    return fig


def clouds(panels: list[tuple]) -> Picture:
    """panels: list of (title, {label: [runs of one setting, ...]}), where runs: list of (KL, y)

    Every run is a pale dot, and a line joins the means of the settings. KL grows with the square of
    the distance that a policy has moved, so its axis shows the square root.
    """
    fig = Picture(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, (label, settings) in enumerate(lines.items()):
            paint, label = colour("", number), label.replace("_", " ")
            dots = [dot for runs in settings for dot in runs]
            means = sorted(tuple(np.mean(runs, 0)) for runs in settings)
            ax.scatter(*zip(*dots), s=7, color=paint, alpha=0.3, linewidth=0)
            ax.plot(*zip(*means), marker=".", color=paint, linewidth=1.6, label=label)
        tidy(ax, title, "", legend=True)
        end = ax.get_xlim()[1]
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ax.set(xlim=(0, end), xticks=[x for x in (0, 0.5, 2, 5, 10, 20, 40, 80, 160) if x <= end])
        ax.set_xlabel("KL to the SFT model, nats a response", fontsize=8, color=GREY)
    return fig


def plot_guess(guess: dict[str, float], truth: dict[str, float]) -> Picture:
    """The reader's guess beside the true value: two bars for each number."""
    columns = min(4, len(guess))
    rows = -(-len(guess) // columns)
    fig = Picture(figsize=(2.4 * columns, 2.2 * rows), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for number, name in enumerate(guess, 1):
        ax = fig.add_subplot(rows, columns, number)
        heights = guess[name], truth[name]
        bars = ax.bar((0, 1), heights, 0.6, color=(COLOURS["reference"], COLOURS["policy"]))
        ax.bar_label(bars, [f"{x:.3g}" for x in heights], fontsize=9, padding=2, color=INK)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.margins(x=0.15, y=0.2)  # room for the labels
        tidy(ax, textwrap.fill(name.replace("_", " "), 20), "")
        ax.set_xticks((0, 1), ("guess", "truth"), va="baseline")
        ax.tick_params(axis="x", pad=12)
        ax.set_yticks(())
    return fig


# In a strip, lengths are in points, 1/72 inch. One Axes fills the picture; its y axis points down.
WIDTH, LEFT, RIGHT = 720, 84, 44  # of the picture; of the names of the rows; of their ranges
ROW, GAP = 16, 12  # the height of a row of cells; the space below a band of rows
KEY = "blue: above zero    red: below zero    grey: none    \u00b7 is a space"
RED_WHITE_BLUE = LinearSegmentedColormap.from_list("", ["#c8453b", "#fbfaf7", "#2b6cb0"], N=255)


def strips(pieces_list: list[list[str]], rows_list: list[dict], titles: list[str]) -> Picture:
    """Responses one below the other: the tokens, and below them a row of cells for each quantity.

    For each response pieces (R strings), rows ({name: R numbers}, NaN where there is none) and a
    title. A quantity has the same colour scale in all responses.
    """
    scales = {}
    for name, row in [item for rows in rows_list for item in rows.items()]:
        sizes = [abs(float(x)) for x in row if np.isfinite(float(x))]
        scales[name] = max([scales.get(name, 0), *sizes])
    fig = Picture()
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")
    bottom = 4  # of what is drawn so far
    for pieces, rows, title in zip(pieces_list, rows_list, titles, strict=True):
        draw_text(ax, 8, bottom + 9, title, 10, weight="bold")
        bottom += 22 if title else 6
        x = WIDTH
        for i, piece in enumerate(map(show_spaces, pieces)):
            width = max(27, 5.5 * len(piece) + 8)  # of the token, and at least that of a number
            if x + width > WIDTH - RIGHT:  # no room left: the response goes on in a new band below
                x, top = LEFT, bottom
                bottom += ROW * (1 + len(rows)) + GAP
                draw_names(ax, top, rows, scales)
            draw_text(ax, x + width / 2, top + ROW / 2, piece, 8.5, ha="center", mono=True)
            for number, (name, row) in enumerate(rows.items(), 1):
                draw_cell(ax, x, top + ROW * number, width, float(row[i]), scales[name])
            x += width
    draw_text(ax, LEFT, bottom, KEY, 7, color=GREY)
    height = bottom + 12
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    fig.set_size_inches(WIDTH / 72, height / 72)
    return fig


def show_spaces(piece):
    """Spaces and line ends are part of a token, so each gets a sign that can be seen."""
    piece = piece if len(piece) <= 40 else piece[:39] + "\u2026"
    piece = piece.replace(" ", "\u00b7").replace("\n", "\u23ce")
    return "".join(c if c.isprintable() else "\ufffd" for c in piece)


def draw_names(ax, top, rows, scales):
    """The name of each row to the left of its cells, and its range to the right."""
    for number, name in enumerate(rows, 1):
        y = top + ROW * number + ROW / 2
        draw_text(ax, LEFT - 6, y, name, 8.5, ha="right")
        limit = f"\u00b1{short(scales[name], scales[name])}"
        draw_text(ax, WIDTH - RIGHT + 6, y, limit, 7, color=GREY)


def draw_cell(ax, x, y, width, value, scale):
    """A coloured rectangle with the number in it; grey and empty where the number is NaN."""
    strength = value / (scale or 1)  # from -1 to 1; in a row of zeros, 0
    face = RED_WHITE_BLUE(0.5 + 0.5 * strength) if np.isfinite(value) else PALE
    ax.add_patch(Rectangle((x, y), width, ROW, facecolor=face, edgecolor="white", linewidth=1))
    if np.isfinite(value):
        ink = "white" if abs(strength) > 0.6 else INK
        draw_text(ax, x + width / 2, y + ROW / 2, short(value, scale), 6.5, ha="center", color=ink)


def short(value, scale):
    """The number with as many decimals as its row needs and its cell has room for."""
    decimals = 3 if scale < 0.1 else 2 if scale < 10 else 1 if scale < 100 else 0
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0 turns -0.0 into 0.0


def draw_text(ax, x, y, text, size, color=INK, mono=False, **style):
    family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
    # Without parse_math=False, a dollar sign in a response would begin a formula.
    ax.text(x, y, text, size=size, color=color, family=family, va="center_baseline",
            parse_math=False, **style)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Draw the log of a run, or of several together.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a log.jsonl")
    try:
        print(overlay(parser.parse_args().runs))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
