"""Drawings of notebook 06: the model with its shapes, where its numbers are, initial values, what heads read.

What it is not: the panel (rwkv_nb.teaching.widgets.model) or the style of all figures (rwkv_nb.teaching.plots).
Symbols: B texts, T tokens, D n_embd, A dim_att, H heads of N channels, F dim_ffn, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.teaching import plots
from rwkv_nb.teaching.model_sizes import parts
from rwkv_nb.teaching.wkv_pictures import heat

BLUE, GREY = plots.COLOURS[0], "#555555"
FILL = {"learned": "#dbe9f4", "plain": "white", "memory": "#fbe3d6"}


def _box(ax: Axes, x: float, y: float, text: str, kind: str = "plain", width: float = 1.7, height: float = 0.52):
    edge = plots.COLOURS[1] if kind == "memory" else BLUE if kind == "learned" else GREY
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.1", "facecolor": FILL[kind], "edgecolor": edge}
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, linewidth=1.2, **style))
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)


def _arrow(ax: Axes, *points: tuple[float, float], shape: str = "", side: str = "left") -> None:
    """An arrow along points; `shape` is written beside the middle of its last piece."""
    for a, b in zip(points[:-2], points[1:-1], strict=True):
        ax.plot(*zip(a, b, strict=True), color=GREY, linewidth=1.1, solid_capstyle="round")
    arrow = {"arrowstyle": "->", "lw": 1.1, "color": GREY, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=points[-1], xytext=points[-2], arrowprops=arrow)
    (x, y), (x2, y2) = points[-2:]
    ax.text((x + x2) / 2 + 0.08, (y + y2) / 2 + 0.02, shape, ha=side, va="center", fontsize=7, color=GREY)


def _tower(ax: Axes) -> None:
    ax.set_title("the model", fontsize=11)
    ax.text(2, 12.6, "token ids (B, T)", ha="center", va="center", fontsize=8.5)
    steps = [(11.7, "emb", "learned"), (10.7, "ln0", "learned")]
    steps += [(9.2, "ln1", "learned"), (8.2, "time mixing", "memory"), (6.0, "ln2", "learned")]
    steps += [(5.0, "channel mixing", "memory"), (2.5, "ln_out", "learned"), (1.5, "head", "learned")]
    for y, name, kind in steps:
        _box(ax, 2, y, name, kind)
    ax.text(2, 0.45, "logits (B, T, V)", ha="center", va="center", fontsize=8.5)
    for top, bottom, shape in ((12.4, 11.97, ""), (11.43, 10.97, "(B, T, D)"), (10.43, 9.47, ""),
                               (8.93, 8.47, ""), (7.93, 7.35, ""), (6.93, 6.27, "(B, T, D)"), (5.73, 5.27, ""),
                               (4.73, 4.15, ""), (3.73, 2.77, "(B, T, D)"), (2.23, 1.77, ""), (1.23, 0.65, "")):
        _arrow(ax, (2, top), (2, bottom), shape=shape)
    for start, plus in ((9.8, 7.14), (6.6, 3.94)):
        ax.text(2, plus, "+", ha="center", va="center", fontsize=11,
                bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": GREY})
        _arrow(ax, (2, start), (0.55, start), (0.55, plus), (1.78, plus))
    ax.add_patch(FancyBboxPatch((0.3, 3.55), 3.4, 6.5, boxstyle="round,pad=0.02,rounding_size=0.15", fill=False,
                                edgecolor=BLUE, linestyle="--", linewidth=1.2))
    ax.text(3.62, 9.75, "a block", ha="right", va="center", fontsize=8.5, color=BLUE)
    ax.text(3.62, 3.8, "L of them", ha="right", va="center", fontsize=8.5, color=BLUE)


def _shifted(ax: Axes, width: float) -> None:
    ax.text(0, 12.6, "x (B, T, D)", ha="center", va="center", fontsize=8.5)
    _arrow(ax, (0, 12.4), (0, 11.97))
    _box(ax, 0, 11.7, "token shift: x of the step before", "memory", width)


def _time_mixing(ax: Axes) -> None:
    ax.set_title("time mixing", fontsize=11)
    _shifted(ax, 4.4)
    columns = dict(zip("rkvg", (-2.25, -0.75, 0.75, 2.25), strict=True))
    for name, x in columns.items():
        _arrow(ax, (x * 0.85, 11.43), (x, 10.87))
        _box(ax, x, 10.6, f"mix $\\mu_{name}$", "learned", 1.25)
        _arrow(ax, (x, 10.33), (x, 9.47), shape="(B, T, D)" if name == "r" else "")
        _box(ax, x, 9.2, f"$W_{name}$", "learned", 1.25)
        if name != "g":
            _arrow(ax, (x, 8.93), (x, 7.37), shape=f"{name} (B, T, H, N)")
    _box(ax, -0.75, 7.0, "WKV-5 with decay $w$, bonus $u$", "memory", 4.3, 0.7)
    _arrow(ax, (-2.3, 6.63), (-2.3, 6.2), (-3.3, 6.2), (-3.3, 7.0), (-2.92, 7.0))
    ax.text(-3.3, 5.98, "state (B, H, N, N)", ha="left", va="center", fontsize=7, color=GREY)
    _arrow(ax, (0, 6.63), (0, 5.27), shape="y (B, T, H, N)")
    _box(ax, 0, 5.0, "ln_x: each head by itself", "learned", 3.2)
    _arrow(ax, (0, 4.73), (0, 3.72), shape="(B, T, A)")
    _box(ax, 2.25, 7.6, "SiLU", width=1.25)
    _arrow(ax, (2.25, 8.93), (2.25, 7.87))
    _arrow(ax, (2.25, 7.33), (2.25, 3.5), (0.25, 3.5))
    ax.text(2.2, 4.35, "g (B, T, A)", ha="right", va="center", fontsize=7, color=GREY)
    ax.text(0, 3.5, "×", ha="center", va="center", fontsize=11,
            bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": GREY})
    _arrow(ax, (0, 3.28), (0, 2.27))
    _box(ax, 0, 2.0, "$W_o$", "learned", 1.25)
    _arrow(ax, (0, 1.73), (0, 0.65))
    ax.text(0, 0.45, "(B, T, D)", ha="center", va="center", fontsize=8.5)


def _channel_mixing(ax: Axes) -> None:
    ax.set_title("channel mixing", fontsize=11)
    _shifted(ax, 3.9)
    for name, x in (("k", -0.9), ("r", 0.9)):
        _arrow(ax, (x * 0.85, 11.43), (x, 10.87))
        _box(ax, x, 10.6, f"mix $\\mu_{name}$", "learned", 1.25)
        _arrow(ax, (x, 10.33), (x, 9.47), shape="(B, T, D)")
        _box(ax, x, 9.2, f"$W_{name}$", "learned", 1.25)
        _arrow(ax, (x, 8.93), (x, 7.87), shape="(B, T, F)" if name == "k" else "(B, T, D)")
    _box(ax, -0.9, 7.6, "ReLU, squared", width=1.6)
    _box(ax, 0.9, 7.6, "sigmoid", width=1.4)
    _arrow(ax, (-0.9, 7.33), (-0.9, 5.87), shape="(B, T, F)")
    _box(ax, -0.9, 5.6, "$W_v$", "learned", 1.25)
    _arrow(ax, (-0.9, 5.33), (-0.9, 3.5), (-0.25, 3.5))
    _arrow(ax, (0.9, 7.33), (0.9, 3.5), (0.25, 3.5))
    ax.text(0, 3.5, "×", ha="center", va="center", fontsize=11,
            bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": GREY})
    _arrow(ax, (0, 3.28), (0, 0.65))
    ax.text(0, 0.45, "(B, T, D)", ha="center", va="center", fontsize=8.5)


def model_figure() -> Figure:
    """The whole model from top to bottom, and the two parts of a block beside it."""
    fig, axes = plots.figure(width=8.7, height=7.4, cols=3, gridspec_kw={"width_ratios": [4, 6.2, 4.2]})
    for ax, draw, limits in zip(axes, (_tower, _time_mixing, _channel_mixing), ((0, 4), (-3.45, 3.1), (-2.1, 2.1)),
                                strict=True):
        ax.set_axis_off()
        ax.set(xlim=limits, ylim=(0.1, 12.9))
        draw(ax)
    return fig


MODEL_ALT = (
    "Three diagrams, read from top to bottom. The model: token ids, emb, ln0, L blocks, ln_out, head, logits. A block "
    "adds to x the time mixing of ln1 of x, then the channel mixing of ln2 of that. Time mixing: token shift, four "
    "mixes, the matrices r, k, v and g, WKV-5 with its state, ln_x, a product with g, and the output matrix. Channel "
    "mixing: token shift, two mixes, a key matrix with squared ReLU, a value matrix, and a product with a sigmoid gate."
)


def shares_figure(models: Mapping[str, ModelConfig]) -> Figure:
    """Where the parameters and the operations of a token are: a bar a model, a piece a part."""
    fig, axes = plots.figure(width=8.6, height=1.5 + 0.45 * len(models), cols=2, sharey=True)
    for ax, field in zip(axes, ("parameters", "operations"), strict=True):
        for row, config in enumerate(models.values()):
            left, found = 0.0, parts(config)
            total = sum(getattr(part, field) for part in found)
            for i, part in enumerate(found):
                width = 100 * getattr(part, field) / total
                ax.barh(row, width, left=left, label=part.name if row == 0 else None, **plots.bar(i))
                left += width
        ax.set(xlabel=f"share of the {field} (%)", xlim=(0, 100), yticks=range(len(models)))
        ax.grid(False)
    axes[0].set_yticklabels(models)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return fig


def layers_figure(values: Sequence[tuple[str, np.ndarray]], label: str) -> Figure:
    """Heat maps side by side: values (L, channels) with layers as rows, each with its own scale."""
    fig, axes = plots.figure(width=8.6, height=2.8, cols=len(values), squeeze=False)
    for ax, (title, value) in zip(axes[0], values, strict=True):
        image = ax.imshow(value, aspect="auto", interpolation="nearest")
        ax.grid(False)
        ax.set(title=title, xlabel="channel", ylabel="layer" if ax is axes[0][0] else "")
        fig.colorbar(image, ax=ax, shrink=0.9, label=label if ax is axes[0][-1] else "")
    return fig


def heads_figure(weights: np.ndarray, titles: Sequence[str], text: str) -> Figure:
    """What each head reads: (heads, T, T) signed weights, row t reads column s, letters at the edges."""
    fig, axes = plots.figure(width=8.7, height=8, rows=2, cols=(len(weights) + 1) // 2)
    for ax, weight, title in zip(axes.flat, weights, titles, strict=True):
        image = heat(ax, weight, tuple(text), tuple(text), signed=True)
        ax.tick_params(labelsize=7)
        ax.set_title(title)
        fig.colorbar(image, ax=ax, shrink=0.7)
    return fig


def states_figure(states: np.ndarray, titles: Sequence[str]) -> Figure:
    """States side by side, one a head: (heads, N, N) as [key, value], each with its own scale around zero."""
    fig, axes = plots.figure(width=8.7, height=2.6, cols=len(states))
    for ax, state, title in zip(axes.flat, states, titles, strict=True):
        heat(ax, state, "key channels, slow to fast" if ax is axes.flat[0] else "", "value channels", signed=True)
        ax.set_title(title)
    return fig
