"""Pictures and the panel of notebook 03: the walk of a magic prime, drawn, counted, and played with.

What it is not: the walk itself (rwkv_nb.data.magic_prime), which these functions only call.
Symbols: p the modulus (magic or, to see what breaks, any other), ii the sample number from 1.
"""

from __future__ import annotations

import html

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from rwkv_nb.data.magic_prime import chunk_of, explain, sample_offset
from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import Panel, number_and_slider

MARKERS = "os^Dvx+*"
COUNT_LIMIT = 100_000  # up to this p every chunk of a pass is counted; beyond it that would take seconds
CELL = "border:1px solid #888; padding:0.15em 0.6em; text-align:right"


def visits(chunks: np.ndarray | list[int], p: int) -> np.ndarray:
    """How often each of the chunks 0 to p - 1 occurs. (p,)"""
    return np.bincount(np.asarray(chunks, dtype=np.int64), minlength=p)


def walk_figure(p: int, world_size: int = 1, samples: int = 120, title: str = "") -> Figure:
    """Chunk against sample number for the first samples; the markers tell which rank (GPU) reads it."""
    fig, ax = plots.figure(height=3)
    for rank in range(world_size):
        numbers = range(1 + rank, samples + 1, world_size)
        style = {"color": plots.COLOURS[rank % len(plots.COLOURS)], "marker": MARKERS[rank % len(MARKERS)]}
        chunks = [chunk_of(p, ii) for ii in numbers]
        ax.plot(numbers, chunks, linestyle="", markersize=4, label=f"rank {rank}", **style)
    ax.set(xlabel="sample number ii", ylabel="chunk", ylim=(-0.03 * p, 1.03 * p),
           title=title or f"The walk for p = {p}")
    if world_size > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def rows_figure(moduli: tuple[int, ...]) -> Figure:
    """One whole walk for each modulus, side by side, with a grey line at every chunk that it reads."""
    fig, axes = plots.figure(width=8.4, height=4.2, cols=len(moduli), squeeze=False)
    for ax, p in zip(axes[0], moduli, strict=True):
        chunks = [chunk_of(p, ii) for ii in range(1, p + 1)]
        ax.grid(False)
        ax.hlines(sorted(set(chunks)), 0, p + 1, color="#bbbbbb", linewidth=0.7)
        ax.plot(range(1, p + 1), chunks, "o", markersize=3.5, color=plots.COLOURS[0])
        ax.set(xlabel="sample number ii", ylabel="chunk",
               title=f"p = {p}, p % 3 = {p % 3}: {len(set(chunks))} of {p} chunks")
    return fig


def visits_figure(counts: dict[str, np.ndarray]) -> Figure:
    """One row of bars for each of `counts`: label -> visits of every chunk in one pass."""
    fig, axes = plots.figure(height=1.5 * len(counts) + 0.4, rows=len(counts), sharey=True, squeeze=False)
    for i, (label, row) in enumerate(counts.items()):
        ax = axes[i, 0]
        ax.bar(range(len(row)), row, width=0.8, color=plots.COLOURS[i % len(plots.COLOURS)])
        ax.set(title=label, ylabel="visits", yticks=range(int(max(c.max() for c in counts.values())) + 1),
               xlim=(-1, len(row)))
    axes[-1, 0].set_xlabel("chunk")
    return fig


def strips_figure(rows: dict[str, np.ndarray], xlabel: str) -> Figure:
    """One strip of ticks for each of `rows`: label -> places between 0 and 1."""
    fig, ax = plots.figure(height=0.5 * len(rows) + 0.9)
    for i, (_, places) in enumerate(rows.items()):
        ax.vlines(places, len(rows) - 1 - i - 0.38, len(rows) - 1 - i + 0.38, color=plots.COLOURS[i], linewidth=1)
    ax.set(yticks=range(len(rows)), yticklabels=list(rows)[::-1], xlim=(-0.01, 1.01), xlabel=xlabel)
    ax.grid(False)
    return fig


def orders_figure(orders: dict[str, np.ndarray], width: int = 26) -> Figure:
    """One square map for each of `orders`: label -> chunks in the order of visit. Chunks row by row, bright = late."""
    fig, axes = plots.figure(height=2.9, cols=len(orders), squeeze=False)
    for ax, (label, order) in zip(axes[0], orders.items(), strict=True):
        when = np.full(-(-len(order) // width) * width, np.nan)
        when[np.asarray(order)] = np.linspace(0, 100, len(order))
        image = ax.imshow(when.reshape(-1, width), aspect="auto")
        ax.set(title=label, xticks=[], yticks=[])
        ax.set_xlabel("chunks, row by row")
        ax.grid(False)
    fig.colorbar(image, ax=axes[0].tolist(), label="visited after % of the pass")
    return fig


def repeats(p: int) -> str:
    """What one pass of p samples does, counted for p up to 100 000."""
    if p > COUNT_LIMIT:
        return f"not counted here (p is above {COUNT_LIMIT})"
    count = visits([chunk_of(p, ii) for ii in range(1, p + 1)], p)
    if (count == 1).all():
        return f"every one of the {p} chunks exactly once"
    return f"{int((count > 0).sum())} of {p} chunks, some {count.max()} times; {int((count == 0).sum())} never"


def report_html(n_tokens: int, ctx_len: int, world_size: int, p: int = 0) -> str:
    """The prime of the data, what one pass does, and where each rank's first samples start. p: 0 = the magic prime."""
    about = explain(n_tokens, ctx_len)
    lines = [html.escape(line) for line in str(about).split("\n")]
    if p == 0 and about.prime is None:
        return f"<p>{lines[0]}</p>"
    p = p or about.prime
    lines.append(f"one pass with p = {p}: {repeats(p)}")
    if p * ctx_len + 1 > n_tokens:
        lines.append(f"p = {p} is too large: its last window ends at token {p * ctx_len + 1} of {n_tokens}")
    head = "".join(f"<th style='{CELL}'>idx {i}</th>" for i in range(5))
    rows = ""
    for rank in range(world_size):
        starts = (sample_offset(p, ctx_len, 0, i, rank, world_size) for i in range(5))
        cells = "".join(f"<td style='{CELL}'>{start}</td>" for start in starts)
        rows += f"<tr><th style='{CELL}'>rank {rank}</th>{cells}</tr>"
    caption = f"<caption>first token of each window</caption><tr><th></th>{head}</tr>"
    return "<p>" + "<br>".join(lines) + f"</p><table style='border-collapse:collapse'>{caption}{rows}</table>"


def panel(n_tokens: int = 200499, ctx_len: int = 512, world_size: int = 2, samples: int = 120) -> Panel:
    """Change tokens, context length, ranks or p and see prime, coverage, first offsets and the walk.

    The controls are attributes of the Panel: tokens, ctx_len, world_size, p; results: report (HTML), picture (Image).
    """
    label = {"style": {"description_width": "initial"}}
    tokens = ipywidgets.BoundedIntText(value=n_tokens, min=1, max=10**15, description="tokens in the data", **label)
    ctx_box, ctx_slider = number_and_slider("ctx_len", ctx_len, 1, 8192)
    world_box, world_slider = number_and_slider("GPUs (world size)", world_size, 1, 8)
    p_box = ipywidgets.BoundedIntText(value=0, min=0, max=10**12, description="p (0: the magic prime)", **label)
    report, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    rows = [tokens, ipywidgets.HBox([ctx_box, ctx_slider]), ipywidgets.HBox([world_box, world_slider]), p_box]
    result = Panel("Walk of the magic prime", [*rows, report, picture])
    result.tokens, result.ctx_len, result.world_size, result.p = tokens, ctx_box, world_box, p_box
    result.report, result.picture = report, picture

    def update(_change: object = None) -> None:
        report.value = report_html(tokens.value, ctx_box.value, world_box.value, p_box.value)
        p = p_box.value or explain(tokens.value, ctx_box.value).prime
        picture.value = plots.png(walk_figure(p, world_box.value, min(samples, 2 * p))) if p else b""
        picture.layout.display = "" if p else "none"

    for control in (tokens, ctx_box, world_box, p_box):
        control.observe(result.guard(update), names="value")
    result.guard(update)()
    return result
