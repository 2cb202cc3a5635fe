"""What only notebooks draw: responses as strips of coloured tokens, guesses beside the truth, and
how often each value occurs.

    from notebooks.drawing import plot_guess, strips     with the repository's root on sys.path

Each returns a picture that a notebook shows when it is the value of a cell.
"""
import textwrap

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from nanorlhf.support.plotting import COLOURS, GREY, INK, OTHERS, PALE, Picture, tidy


def plot_guess(guess: dict[str, float], truth: dict[str, float]) -> Picture:
    """The reader's guess beside the true value: two bars for each number."""
    columns = min(4, len(guess))
    rows = -(-len(guess) // columns)
    fig = Picture(figsize=(2.4 * columns, 2.2 * rows), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    shares = all(0 <= x <= 1 for x in [*guess.values(), *truth.values()])
    for number, name in enumerate(guess, 1):
        ax = fig.add_subplot(rows, columns, number)
        heights = guess[name], truth[name]
        bars = ax.bar((0, 1), heights, 0.6, color=(COLOURS["reference"], COLOURS["policy"]))
        ax.bar_label(bars, [f"{x:.3g}" for x in heights], fontsize=9, padding=2, color=INK)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.margins(x=0.15, y=0.2)  # room for the labels
        if shares:
            ax.set_ylim(0, 1.2)    # so that bars of several panels can be compared
        tidy(ax, textwrap.fill(name.replace("_", " "), 20), "")
        ax.set_xticks((0, 1), ("guess", "truth"), va="baseline")
        ax.tick_params(axis="x", pad=12)
        ax.set_yticks(())
    return fig


def histograms(panels: list[tuple]) -> Picture:
    """panels: list of (title, what is measured, what is counted, {label: values})"""
    fig = Picture(figsize=(3.8 * len(panels), 2.7), layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, measured, counted, groups) in zip(axes, panels):
        edges = np.histogram_bin_edges(np.concatenate([*groups.values()]), 30)
        for colour, (label, values) in zip(OTHERS, groups.items()):
            ax.hist(values, edges, color=colour, alpha=0.55, label=label)
        tidy(ax, title, counted, legend=len(groups) > 1)
        ax.set_xlabel(measured, fontsize=8, color=GREY)
    return fig


# In a strip, lengths are in points, 1/72 inch. One Axes fills the picture; its y axis points down.
WIDTH, LEFT, RIGHT = 720, 84, 44  # of the picture; of the names of the rows; of their ranges
ROW, GAP = 16, 12  # the height of a row of cells; the space below a band of rows
KEY = "blue: above zero    red: below zero    grey: none    \u00b7 is a space"
RED_WHITE_BLUE = LinearSegmentedColormap.from_list("", ["#c8453b", "#fbfaf7", "#2b6cb0"], N=255)


def strips(pieces_list: list[list[str]], rows_list: list[dict], titles: list[str]) -> Picture:
    """Responses one below the other: the tokens, and below them a row of cells for each quantity.

    For each response pieces (R strings), rows ({name: R numbers}, NaN where there is none) and a
    title. Rows whose names end in the same word, such as old_logprobs and ref_logprobs, have the
    same colour scale, in all responses.
    """
    same_scale, scales = {}, {}
    for name, row in [item for rows in rows_list for item in rows.items()]:
        sizes = scales[name] = same_scale.setdefault(name.split("_")[-1], [0])
        sizes += [abs(float(x)) for x in row if np.isfinite(float(x))]
    scales = {name: max(sizes) for name, sizes in scales.items()}
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


def dashboards(logs: dict[str, list[dict]], healthy: list[list[dict]], metrics: dict) -> Picture:
    """A row of panels for each log, and healthy runs in grey behind it.

    logs: {title: rows of a log.jsonl}; metrics: {metric: (title, unit, others to draw dashed)}. The
    panels of a metric share their y axis.
    """
    fig = Picture(figsize=(1.85 * len(metrics), 1.45 * len(logs) + 0.4), layout="constrained")
    axes = fig.subplots(len(logs), len(metrics), sharex=True, sharey="col", squeeze=False)
    for row, (title, log) in zip(axes, logs.items()):
        for ax, (metric, (name, unit, *_)) in zip(row, metrics.items()):
            for other in healthy:
                ax.plot([line[metric] for line in other], color=GREY, alpha=0.35, linewidth=0.8)
            ax.plot([line[metric] for line in log], color=COLOURS.get(metric, INK), linewidth=1.8)
            tidy(ax, name if ax in axes[0] else "", unit if ax in axes[0] else "")
            ax.tick_params(labelsize=7)
        row[0].set_ylabel(title, fontsize=11, color=INK, fontweight="bold", rotation=0, ha="right")
    for row, log in zip(axes, logs.values()):
        for ax, (_, _, *dashed) in zip(row, metrics.values()):
            ax.set_ylim(ax.get_ylim())       # a dashed line may leave the panel
            for metric in dashed:
                ax.plot([line[metric] for line in log], "--", color=INK, linewidth=1)
    for ax in axes[-1]:
        ax.set_xlabel("step", fontsize=8, color=GREY)
    return fig
