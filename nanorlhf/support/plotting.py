"""log.jsonl becomes curves.png; a response becomes a strip of coloured tokens.

In: a run's folder, or tokens and the numbers that belong to them. Out: pictures under 100 kB, in
which a name has the same colour everywhere. Nothing here needs a display, or touches the backend
that a notebook has chosen: in a notebook, a figure at the end of a cell is shown.

    python -m nanorlhf.support.plotting out/ppo              redraws one run, every metric
    python -m nanorlhf.support.plotting out/ppo out/grpo     overlays several runs, in ./curves.png
"""

import argparse
import io
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from nanorlhf import UserError
from nanorlhf.support.runlog import read

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
RED_WHITE_BLUE = ["#c8453b", "#fbfaf7", "#2b6cb0"]
DIVERGING = LinearSegmentedColormap.from_list("", RED_WHITE_BLUE, N=255)  # odd: zero is white
DPI = 80


class Picture(Figure):
    """A Figure that a notebook shows by itself, whether or not pyplot has been imported."""

    def png(self):
        """128 colours are enough here, and a third of the bytes."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, dpi=DPI)
        Image.open(full).convert("RGB").quantize(128).save(small, "png", optimize=True)
        return small.getvalue()

    _repr_png_ = png  # the name that notebooks ask for


def curves(folder, panels):
    """Draw log.jsonl as small multiples -> the path of curves.png

    panels: list of (title, unit, [metric, ...]). What the log does not have is left out.
    """
    log = history(folder)
    drawn = []
    for title, unit, names in panels:
        lines = [(name, colour(name, i), *log[name]) for i, name in enumerate(names) if name in log]
        if lines:
            drawn.append((title, unit, lines))
    path = Path(folder) / "curves.png"
    path.write_bytes(small_multiples(drawn).png())
    return path


def overlay(folders):
    """Every metric that the runs share, one panel each -> the path of curves.png

    It lies in the run's folder if there is one run, and in the current folder if there are several.
    """
    logs = [history(folder) for folder in folders]
    panels = []
    for name in logs[0]:
        if all(name in log for log in logs):
            labels = folders if not panels else [""] * len(folders)  # one legend is enough
            colours = OTHERS if len(logs) > 1 else [colour(name)]
            lines = [(x, c, *log[name]) for x, c, log in zip(labels, colours, logs, strict=False)]
            panels.append((name.replace("_", " "), UNITS.get(name, ""), lines))
    path = Path(folders[0] if len(folders) == 1 else ".") / "curves.png"
    path.write_bytes(small_multiples(panels).png())
    return path


def history(folder):
    """log.jsonl -> {metric: (steps, values)}; a metric need not be in every line."""
    log = {}
    for row in read(folder):
        step = row.pop("step")
        for name, value in row.items():
            steps, values = log.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return log


def colour(name, otherwise=0):
    return COLOURS.get(name, OTHERS[otherwise % len(OTHERS)])


def small_multiples(panels):
    """panels: list of (title, unit, [(label, colour, steps, values), ...]) -> Figure"""
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    fig = Picture(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for number, (title, unit, lines) in enumerate(panels, 1):
        ax = fig.add_subplot(rows, columns, number, sharex=fig.axes[0] if fig.axes else None)
        for line in lines:
            draw_line(ax, *line)
        tidy(ax, title, unit)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if number > len(panels) - columns:
            ax.set_xlabel("step", fontsize=8, color=GREY)
        if len(lines) > 1 and lines[0][0]:
            ax.legend(fontsize=8, frameon=False, labelcolor=INK)
    return fig


def growth(panels, unit):
    """panels: list of (title, sizes, {label: values}) -> Figure, both axes logarithmic."""
    fig = Picture(figsize=(3.6 * len(panels), 2.8), layout="constrained")
    for ax, (title, sizes, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, (label, values) in enumerate(lines.items()):
            ax.plot(sizes, values, marker=".", label=label, color=OTHERS[number])
        ax.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
        ax.minorticks_off()
        tidy(ax, title, unit)
        ax.legend(fontsize=8, frameon=False, labelcolor=INK)
    return fig


def clouds(panels):
    """panels: list of (title, {label: [dots of one setting, ...]}), dots: list of (KL, y) -> Figure

    Every run is a pale dot; the means of the settings are joined by a line. KL grows as the square
    of how far a policy has moved, so its axis is drawn by the root.
    """
    fig = Picture(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, (label, settings) in enumerate(lines.items()):
            paint = OTHERS[number % len(OTHERS)]
            ax.scatter(*zip(*[dot for dots in settings for dot in dots]), s=7, color=paint,
                       alpha=0.3, linewidth=0)
            means = sorted(tuple(np.mean(dots, 0)) for dots in settings)
            ax.plot(*zip(*means), marker=".", color=paint, linewidth=1.6,
                    label=label.replace("_", " "))
        tidy(ax, title, "")
        far = ax.get_xlim()[1]
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ax.set(xlim=(0, far), xticks=[x for x in (0, 0.5, 2, 5, 10, 20, 40, 80, 160) if x <= far])
        ax.set_xlabel("KL to the SFT model, nats a response", fontsize=8, color=GREY)
        ax.legend(fontsize=8, frameon=False, labelcolor=INK)
    return fig


def draw_line(ax, label, colour, steps, values):
    """A long noisy line is drawn twice: as it is, pale, and its running mean on top."""
    if len(values) >= 50:
        ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        window = np.ones(len(values) // 25 * 2 + 1)
        counts = np.convolve(np.ones(len(values)), window, "same")  # fewer at both ends
        values = np.convolve(values, window, "same") / counts
    marker = "." if len(values) < 20 else ""
    ax.plot(steps, values, color=colour, linewidth=1.6, marker=marker, label=label)


def tidy(ax, title, unit):
    ax.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    ax.set_ylabel(unit, fontsize=8, color=GREY)
    ax.tick_params(labelsize=8, colors=GREY, length=0)
    ax.grid(axis="y", color=PALE)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)


# A strip is laid out in points, 1/72 inch, on one Axes that fills the picture; y grows downwards.
WIDTH, LEFT, RIGHT = 720, 84, 44  # of the picture; for the rows' names; for their ranges
ROW, GAP = 16, 12  # the height of a row of cells; between the bands of a long response
LETTER, NARROWEST = 5.5, 27  # of a token, in points; a cell that has room for its number
KEY = "blue: above zero    red: below zero    grey: none    \u00b7 is a space"


def token_strip(pieces, rows, title=""):
    """One response as a row of tokens, over a row of coloured numbers for each quantity -> Figure

    pieces: R strings. rows: {name: R numbers}; NaN means that there is none, and stays grey.
    """
    return strips([pieces], [rows], [title])


def strips(pieces_list, rows_list, titles):
    """Several responses, one below the other; a quantity has one colour scale in all of them."""
    rows_list = [{k: np.array([float(x) for x in row]) for k, row in rows.items()}
                 for rows in rows_list]                                # tensors of any device too
    scales = {}
    for name, row in [item for rows in rows_list for item in rows.items()]:
        scales[name] = max(scales.get(name, 0), np.abs(row[np.isfinite(row)]).max(initial=0))
    fig = Picture()
    ax = fig.add_axes((0, 0, 1, 1))
    ax.axis("off")
    top = 4
    for pieces, rows, title in zip(pieces_list, rows_list, titles, strict=True):
        write(ax, 8, top + 9, title, 10, weight="bold")
        top += 22 if title else 6
        for band in wrap([cell_width(piece) for piece in pieces]):
            draw_band(ax, top, band, pieces, rows, scales)
            top += ROW * (1 + len(rows)) + GAP
    write(ax, LEFT, top, KEY, 7, colour=GREY)
    height = top + 12
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    fig.set_size_inches(WIDTH / 72, height / 72)
    return fig


def cell_width(piece):
    return max(NARROWEST, LETTER * len(visible(piece)) + 8)


def visible(piece):
    """Spaces and line ends are part of a token, so they must be seen."""
    piece = piece if len(piece) <= 40 else piece[:39] + "\u2026"
    piece = piece.replace(" ", "\u00b7").replace("\n", "\u23ce")
    return "".join(c if c.isprintable() else "\ufffd" for c in piece)


def wrap(widths):
    """Break a response into bands that fit the picture: lists of (token number, x, width)."""
    bands, x = [], WIDTH
    for i, width in enumerate(widths):
        if x + width > WIDTH - RIGHT:
            bands.append([])
            x = LEFT
        bands[-1].append((i, x, width))
        x += width
    return bands


def draw_band(ax, top, band, pieces, rows, scales):
    for i, x, width in band:
        write(ax, x + width / 2, top + ROW / 2, visible(pieces[i]), 8.5, align="center", mono=True)
    for number, (name, row) in enumerate(rows.items(), 1):
        y = top + ROW * number
        write(ax, LEFT - 6, y + ROW / 2, name, 8.5, align="right")
        limit = short(scales[name], scales[name])
        write(ax, WIDTH - RIGHT + 6, y + ROW / 2, f"\u00b1{limit}", 7, colour=GREY)
        for i, x, width in band:
            draw_cell(ax, x, y, width, row[i], scales[name])


def draw_cell(ax, x, y, width, value, scale):
    strength = value / (scale or 1)  # from -1 to 1; an all-zero row has no scale, and is white
    face = DIVERGING(0.5 + 0.5 * strength) if np.isfinite(value) else PALE
    ax.add_patch(Rectangle((x, y), width, ROW, facecolor=face, edgecolor="white", linewidth=1))
    if np.isfinite(value):
        ink = "white" if abs(strength) > 0.6 else INK
        write(ax, x + width / 2, y + ROW / 2, short(value, scale), 6.5, align="center", colour=ink)


def short(value, scale):
    """As many decimals as the cell has room for and the row needs."""
    decimals = 3 if scale < 0.1 else 2 if scale < 10 else 1 if scale < 100 else 0
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0 turns -0.0 into 0.0


def write(ax, x, y, text, size, colour=INK, align="left", weight="normal", mono=False):
    family = "DejaVu Sans Mono" if mono else "DejaVu Sans"
    ax.text(
        x, y, text, fontsize=size, color=colour, ha=align, va="center_baseline", weight=weight,
        family=family, parse_math=False,  # a dollar in a response is a dollar
    )  # fmt: skip


def plot_guess(guess, truth):
    """What you said and what came: two bars for each number. {name: float}, twice -> Figure"""
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


def main():
    parser = argparse.ArgumentParser(description="Draw the log of a run, or of several together.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with a log.jsonl")
    try:
        print(overlay(parser.parse_args().runs))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
