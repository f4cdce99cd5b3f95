"""Drawings of notebook 09: parts of a model as bars, memory against context, 8 bits step by step; and a stand-in model.

What it is not: the planner's panel (rwkv_nb.teaching.widgets.strategy) or the style of all figures (plots).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import parameter_shapes
from rwkv_nb.teaching import plots


def random_world(path: str | os.PathLike, n_layer: int = 3, n_embd: int = 64) -> Path:
    """Write a random model of the World vocabulary: the shapes of an Eagle, 17 MB, and nothing learnt."""
    g, weights = torch.Generator().manual_seed(0), {}
    for name, shape in parameter_shapes(ModelConfig(n_layer, n_embd, 65536)).items():
        around = 1.0 if "ln" in name and name.endswith(".weight") else 0.0
        weights[name] = (around + 0.1 * torch.randn(shape, generator=g)).bfloat16()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(weights, partial)
    os.replace(partial, path)
    return path


def shares_figure(parts: Mapping[str, float], unit: float, label: str) -> Figure:
    """A bar for each part, with its share of the whole."""
    fig, ax = plots.figure(height=0.42 * len(parts) + 0.7)
    total = sum(parts.values())
    names, values = list(parts), [value / unit for value in parts.values()]
    ax.barh(names, values, height=0.6, **plots.bar(0))
    for y, value in enumerate(values):
        ax.text(value, y, f"  {value * unit / total:.1%}", va="center", fontsize=9)
    ax.set(xlabel=label, xlim=(0, 1.15 * max(values)), ylim=(len(names) - 0.5, -0.5))
    ax.grid(axis="y")
    return fig


def contexts_figure(constant: Mapping[str, float], growing: Mapping[str, float], longest: float = 1e6) -> Figure:
    """Bytes of memory against tokens read: constant ones, and ones that grow by so many bytes a token."""
    tokens = np.geomspace(1, longest, 200)
    fig, ax = plots.figure(height=3.6)
    for i, (name, size) in enumerate(constant.items()):
        ax.plot(tokens, np.full_like(tokens, size), label=name, linewidth=2.5, **plots.line(i))
    for i, (name, size) in enumerate(growing.items(), start=len(constant)):
        ax.plot(tokens, tokens * size, label=name, **plots.line(i))
    ax.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="bytes beside the weights")
    labels = {1e5: "100 kB", 1e6: "1 MB", 1e7: "10 MB", 1e8: "100 MB", 1e9: "1 GB", 1e10: "10 GB", 1e11: "100 GB"}
    ax.set_yticks(list(labels), labels.values())
    ax.legend(loc="upper left")
    return fig


def levels_figure(row: Sequence[float], rounded: Sequence[float], levels: Sequence[float]) -> Figure:
    """A few weights as dots, the values that 8 bits can say as lines, and where each weight is moved."""
    fig, ax = plots.figure(height=2.8)
    for level in levels:
        ax.axhline(level, color="#999999", linewidth=0.6)
    x = np.arange(len(row))
    ax.plot(x, row, "o", color=plots.COLOURS[0], label="weight")
    ax.plot(x, rounded, "x", color=plots.COLOURS[1], label="what is stored", markersize=8)
    ax.vlines(x, row, rounded, color=plots.COLOURS[1], linewidth=1)
    ax.set(xlabel="weight", ylabel="value", xticks=x)
    ax.grid(False)
    ax.legend(loc="upper right", ncols=2)
    return fig


def errors_figure(errors: Mapping[str, float], bits: Mapping[str, float]) -> Figure:
    """Relative error of each way of rounding as bars, with the bits that it needs for a weight."""
    fig, ax = plots.figure(height=0.42 * len(errors) + 0.8)
    values = [100 * error for error in errors.values()]
    ax.barh(list(errors), values, height=0.6, **plots.bar(1))
    for y, name in enumerate(errors):
        ax.text(values[y], y, f"  {bits[name]:.3g} bits a weight", va="center", fontsize=9)
    ax.set(xlabel="error (% of the weights' size)", xlim=(0, max(values) * 1.3), ylim=(len(errors) - 0.5, -0.5))
    ax.grid(axis="y")
    return fig


def losses_figure(losses: Mapping[int, float]) -> Figure:
    """Loss against bits a weight, few on the right."""
    fig, ax = plots.figure(height=2.6)
    ax.plot([str(bits) for bits in losses], list(losses.values()), marker="o", **plots.line(0))
    ax.set(xlabel="bits a weight", ylabel="loss (bits a character)")
    return fig


def scores_figure(groups: Mapping[str, Mapping[str, float]], means: Mapping[str, float]) -> Figure:
    """Published scores as bars, a group in each colour, and a line at the mean of each."""
    fig, ax = plots.figure(height=3)
    start = 0
    for i, (name, scores) in enumerate(groups.items()):
        places = list(range(start, start + len(scores)))
        ax.bar(places, list(scores.values()), label=f"{name}, mean {means[name]:g}", **plots.bar(2 * i))
        ax.plot([places[0] - 0.45, places[-1] + 0.45], [means[name]] * 2, color="black", linestyle="--")
        start += len(scores)
    ax.set(ylabel="%", ylim=(0, 100), xlim=(-0.7, start - 0.3))
    names = [name for scores in groups.values() for name in scores]
    ax.set_xticks(range(start), names, rotation=40, ha="right", rotation_mode="anchor")
    ax.grid(axis="x")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(groups))
    return fig
