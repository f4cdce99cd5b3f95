"""Pictures of notebook 08: the way from logits to text, distributions before and after a filter, text by its surprise.

    bars({"before": p, "after": q}, tokenizer)     one panel of bars for each distribution, the same tokens in all
    surprise(text, bits)                           a text whose characters are shaded by what each cost

What it is not: sampling (`rwkv_nb.inference`), or the panel (`widgets/sampling.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from rwkv_nb.teaching import plots
from rwkv_nb.teaching.sampling_steps import label, likeliest, percent

WAY = (
    ("model", "logits"),
    ("penalties", "what was said\ncounts less"),
    ("bans", "never these"),
    ("softmax", "chances"),
    ("top_p", "cut the tail\nby its weight"),
    ("top_k", "cut it\nby number"),
    ("temperature", "sharpen\nor flatten"),
    ("draw", "one token"),
)
WAY_ALT = (
    "Eight boxes from left to right: model, penalties, bans, softmax, top_p, top_k, temperature, draw. An arrow leads "
    "from the last back to the first: the token that was drawn is read next."
)


def way() -> Figure:
    """The steps between two tokens, and the arrow back."""
    fig, ax = plots.figure(width=9.6, height=1.9)
    ax.set_axis_off()
    ax.set(xlim=(-0.1, len(WAY)), ylim=(-0.3, 1.0))
    box = {"boxstyle": "round,pad=0.45", "facecolor": "#e8f1f8", "edgecolor": plots.COLOURS[0], "linewidth": 1.4}
    for i, (name, detail) in enumerate(WAY):
        ax.text(i + 0.45, 0.8, name, ha="center", va="center", bbox=box, fontsize=9)
        ax.text(i + 0.45, 0.38, detail, ha="center", va="center", fontsize=8)
        if i:
            ax.annotate("", xy=(i + 0.02, 0.8), xytext=(i - 0.12, 0.8), arrowprops={"arrowstyle": "->", "lw": 1.4})
    back = {"arrowstyle": "->", "lw": 1.4, "connectionstyle": "bar,fraction=-0.03", "color": plots.COLOURS[0]}
    ax.annotate("", xy=(0.45, 0.12), xytext=(len(WAY) - 0.55, 0.12), arrowprops=back)
    ax.text(len(WAY) / 2, -0.16, "read it, and again", ha="center", va="center", fontsize=8)
    return fig


def bars(chances: Mapping[str, Tensor], tokenizer, n: int = 12, width: float = 2.5) -> Figure:
    """One panel of horizontal bars for each distribution (V,), with the n tokens that are likeliest in any of them.

    A token that a distribution has cut has no bar and a dash; the number of tokens left stands below.
    """
    tokens = likeliest(dict(chances), n)
    fig, axes = plots.figure(width=0.9 + width * len(chances), height=0.9 + 0.21 * len(tokens), cols=len(chances),
                             sharey=True, squeeze=False)  # fmt: skip
    top = max(float(p.max()) for p in chances.values())
    for ax, (name, p) in zip(axes[0], chances.items(), strict=True):
        values = [float(p[t]) for t in tokens]
        ax.barh(range(len(tokens)), values, **plots.bar(0))
        for i, value in enumerate(values):
            ax.text(value + 0.02 * top, i, percent(value), va="center", fontsize=7)
        left = int((p > 0).sum())
        ax.set(title=name, xlim=(0, 1.3 * top), xlabel=f"chance; {left} token{'s' * (left != 1)} left")
    axes[0, 0].set_yticks(range(len(tokens)), [label(tokenizer, t) for t in tokens], family="monospace")
    axes[0, 0].invert_yaxis()
    return fig


def ranks(chances: Mapping[str, Tensor], n: int = 40) -> Figure:
    """Probability against rank, on a logarithmic scale, for several distributions: how long a tail is."""
    fig, ax = plots.figure(height=2.8)
    for i, (name, p) in enumerate(chances.items()):
        ordered = p.sort(descending=True).values[:n].numpy()
        ordered = ordered[ordered > 0]
        ax.plot(range(1, len(ordered) + 1), ordered, marker=".", **plots.line(i), label=name)
    ax.set(yscale="log", xlabel="rank of the token, the likeliest first", ylabel="its chance")
    ax.legend(fontsize=8)
    return fig


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str, **limits) -> Figure:
    """Several curves, label -> (x, y), with marks if they have few points."""
    fig, ax = plots.figure(height=2.8)
    for i, (name, (x, y)) in enumerate(curves.items()):
        ax.plot(x, y, marker="o" if len(x) <= 20 else None, markersize=4, **plots.line(i), label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, **limits)
    if len(curves) > 1:
        ax.legend(fontsize=8)
    return fig


def surprise(text: str, bits: Sequence[float], columns: int = 72, most: float = 6.0) -> Figure:
    """The text in lines, each character on a ground as dark as it was surprising, up to `most` bits."""
    cells = [(char, float(b)) for char, b in zip(text, bits, strict=True)]
    rows: list[list[tuple[str, float]]] = [[]]
    for char, b in cells:
        if len(rows[-1]) == columns:
            rows.append([])
        rows[-1].append(("⏎" if char == "\n" else char, b))
        if char == "\n":
            rows.append([])
    rows = [row for row in rows if row]
    fig, ax = plots.figure(width=9.0, height=0.35 + 0.25 * len(rows))
    norm, colours = matplotlib.colors.Normalize(0, most), matplotlib.colormaps["Blues"]
    for y, row in enumerate(rows):
        for x, (char, b) in enumerate(row):
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=colours(norm(min(b, most))), edgecolor="none"))
            ax.text(x + 0.5, y + 0.53, char, ha="center", va="center", fontsize=8, family="monospace",
                    color="white" if b > 0.6 * most else "black")  # fmt: skip
    ax.set(xlim=(0, columns), ylim=(len(rows), 0), xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=ax, fraction=0.03, pad=0.01)
    bar.set_label("bits", fontsize=8)
    return fig


def cost(read: Mapping[str, int]) -> Figure:
    """Bars of tokens read, one for each way to do the same."""
    fig, ax = plots.figure(height=0.5 + 0.38 * len(read))
    ax.barh(list(read), list(read.values()), **plots.bar(0))
    for i, count in enumerate(read.values()):
        ax.text(count, i, f" {count:,}", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="tokens that the model read", xlim=(0, 1.12 * max(read.values())))
    return fig


def repeated(text: str, size: int = 12) -> np.ndarray:
    """For each place of a text, whether its `size` characters stood earlier in it: 1 in a loop, 0 for new text."""
    seen: set[str] = set()
    found = []
    for start in range(len(text) - size + 1):
        piece = text[start : start + size]
        found.append(piece in seen)
        seen.add(piece)
    return np.array(found, dtype=float)
