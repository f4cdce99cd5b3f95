"""Pictures of notebook 07: the loop of training, curves of short runs, and the ladder of predictors.

What it is not: the plot that grows while a model trains (pictures.TrainingPlot), the schedule (widgets/training.py).
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from rwkv_nb.teaching import plots

STAGES = (
    ("batch", "x and y, one\ntoken apart"),
    ("forward", "logits"),
    ("loss", "surprise at y"),
    ("backward", "a gradient for\nevery weight"),
    ("clip", "its norm\nat most 1"),
    ("Adam step", "every weight\nmoves a little"),
)
LOOP_ALT = (
    "Six boxes from left to right: batch, forward, loss, backward, clip, Adam step. An arrow leads from the last back "
    "to the first; the schedule above gives the last its learning rate."
)


def loop() -> Figure:
    """One step of training, box by box, and the arrow back: the next batch."""
    fig, ax = plots.figure(width=9.2, height=2.5)
    ax.set_axis_off()
    ax.set(xlim=(-0.1, len(STAGES)), ylim=(-0.25, 1.3))
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#e8f1f8", "edgecolor": plots.COLOURS[0], "linewidth": 1.4}
    for i, (name, detail) in enumerate(STAGES):
        ax.text(i + 0.45, 0.7, name, ha="center", va="center", bbox=box, fontsize=10)
        ax.text(i + 0.45, 0.33, detail, ha="center", va="center", fontsize=8)
        if i:
            ax.annotate("", xy=(i + 0.02, 0.7), xytext=(i - 0.14, 0.7), arrowprops={"arrowstyle": "->", "lw": 1.4})
    last = len(STAGES) - 0.55
    back = {"arrowstyle": "->", "lw": 1.4, "connectionstyle": "bar,fraction=-0.05", "color": plots.COLOURS[0]}
    ax.annotate("", xy=(0.45, 0.12), xytext=(last, 0.12), arrowprops=back)
    ax.text((0.45 + last) / 2, -0.03, "the next batch", ha="center", va="center", fontsize=8)
    schedule = box | {"facecolor": "white", "linestyle": "--"}
    ax.text(last, 1.17, "schedule", ha="center", va="center", bbox=schedule, fontsize=9)
    ax.annotate("", xy=(last, 0.86), xytext=(last, 1.03), arrowprops={"arrowstyle": "->", "lw": 1.4})
    return fig


def smooth(values: list[float], width: int) -> np.ndarray:
    """Mean of each value and up to width - 1 before it: of the same length, without looking ahead."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def curves(runs: dict[str, list[float]], ylabel: str, width: int = 1, every: int = 1) -> Figure:
    """One line for each of `runs` (label -> a value each step), each the mean of the last `width` values."""
    fig, ax = plots.figure(height=2.8)
    for i, (label, values) in enumerate(runs.items()):
        shown = smooth(values, width)[::every]
        ax.plot(np.arange(len(shown)) * every, shown, **plots.line(i), label=label)
    ax.set(xlabel="step", ylabel=ylabel)
    ax.legend(loc="best", fontsize=8)
    return fig


def ladder(rungs: dict[str, float], models: int) -> Figure:
    """Bars of bits a character, lowest at the bottom of the page; the last `models` of them are the model's."""
    fig, ax = plots.figure(height=0.28 * len(rungs) + 0.7)
    for i, (name, height) in enumerate(rungs.items()):
        ax.barh(name, height, **plots.bar(0 if i < len(rungs) - models else 1))
        ax.text(height + 0.05, i, f"{height:.2f}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="bits per character on held-out text (less is better)")
    return fig
