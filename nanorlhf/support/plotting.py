"""Draws the logs of runs: curves.png, in which a metric always has the same colour."""
import io
from itertools import chain, cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from nanorlhf.support import runlog

INK, GREY, PALE = "#22272e", "#8a9099", "#e9eaec"
COLOURS = dict(policy="#2b6cb0", reference="#8a9099", loss="#2b6cb0", policy_loss="#2b6cb0",
               value_loss="#e0701f", score="#159a9c", kl="#7d57b5", entropy="#b5527f",
               accuracy="#2f9e62", margin="#8a6d3b", sft="#8a9099", ppo="#2b6cb0",
               reinforce="#b5527f", rloo="#159a9c", grpo="#e0701f", best_of_n="#2f9e62",
               dpo="#7d57b5", ilql="#cf4a4a", ppo_true_reward="#22272e")
OTHERS = ("#2b6cb0", "#e0701f", "#2f9e62", "#cf4a4a", "#7d57b5", "#159a9c", "#8a6d3b", "#b5527f")
UNITS = dict(loss="nats / token", kl="nats / response", entropy="nats / token",
             response_len="tokens", accuracy="fraction", clip_frac="fraction")


class Picture(Figure):
    """A Figure that a notebook shows when it is the value of a cell, without pyplot."""

    def png(self):
        """The bytes of a PNG file of 128 colours, a third of the size of one with all colours."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, dpi=80)
        Image.open(full).convert("RGB").quantize(128).save(small, "png", optimize=True)
        return small.getvalue()

    _repr_png_ = png  # the method that notebooks call


def curves(folder, panels=()):
    """Draw a run's log, in panels (title, unit, [metric, ...]) or one a metric -> its curves.png"""
    log, drawn = history(folder), []
    panels = panels or [(name.replace("_", " "), UNITS.get(name, ""), [name]) for name in log]
    for title, unit, names in panels:
        lines = [(name, COLOURS.get(name, other), *zip(*log[name]))
                 for name, other in zip(names, cycle(OTHERS)) if name in log]
        if lines:
            drawn.append((title, unit, lines))
    path = Path(folder) / "curves.png"
    path.write_bytes(small_multiples(drawn).png())
    return path


def history(folder):
    """log.jsonl -> {metric: [(step, value), ...]}; not every line has every metric."""
    log = {}
    for row in runlog.read(folder):
        step = row.pop("step")
        for name, value in row.items():
            log.setdefault(name, []).append((step, value))
    return log


def small_multiples(panels):
    """panels: list of (title, unit, [(label, colour, steps, values), ...]), up to three in a row"""
    columns = min(3, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    fig = Picture(figsize=(3.6 * columns, 2.5 * rows), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for number, (title, unit, lines) in enumerate(panels, 1):
        ax = fig.add_subplot(rows, columns, number, sharex=fig.axes[0] if fig.axes else None)
        for label, colour, steps, values in lines:
            marker = "." if len(values) < 20 else ""
            if len(values) >= 50:  # drawn twice: pale as it is, and on top its running mean
                ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                window = np.ones(len(values) // 25 * 2 + 1)
                counts = np.convolve(np.ones(len(values)), window, "same")  # fewer at both ends
                values = np.convolve(values, window, "same") / counts
            ax.plot(steps, values, color=colour, linewidth=1.6, marker=marker, label=label)
        tidy(ax, title, unit, legend=len(lines) > 1 and lines[0][0])
        ax.locator_params("x", nbins=5, integer=True)
        if number > len(panels) - columns:
            ax.set_xlabel("step", fontsize=8, color=GREY)
    return fig


def clouds(panels, x="KL to the SFT model, nats a response",
           ticks=(0, 0.5, 2, 5, 10, 20, 40, 80, 160)):
    """panels: list of (title, {label: [[(x, y) of a run, ...] of a setting, ...]}): dots, means"""
    fig = Picture(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for ax, (title, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        for other, marker, (label, settings) in zip(cycle(OTHERS), cycle("osD^vP"), lines.items()):
            label, colour = label.replace("_", " "), COLOURS.get(label, other)
            means = sorted(tuple(np.mean(runs, 0)) for runs in settings)
            ax.scatter(*zip(*chain(*settings)), s=7, color=colour, alpha=0.3, linewidth=0)
            ax.plot(*zip(*means), marker=marker, markersize=4, color=colour, linewidth=1.6,
                    label=label)
        tidy(ax, title, "", legend=True)
        end = ax.get_xlim()[1]  # the root of the KL shows how far a policy has moved
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ax.set(xlim=(0, end), xticks=[tick for tick in ticks if tick <= end])
        ax.set_xlabel(x, fontsize=8, color=GREY)
    return fig


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
