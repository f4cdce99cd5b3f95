"""Drawings of notebook 05: what a GPU runs, who works on what, where numbers lie in memory, which steps must wait.

What it is not: the kernels (kernels/), their text with line numbers (kernel_source.py), what limits them (roofline.py),
or the style of all figures (plots.py).
Symbols: B texts, H heads, T steps, N channels of a head; block number b H + h, thread number i; L steps of a chunk.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from rwkv_nb.teaching import plots

BLUE, ORANGE, GREEN = plots.COLOURS[:3]
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE_GREY = "#dbe9f4", "#fbe3d0", "#d5efe5", "#ececec"
# What a box stands for: its fill and its edge.
EMPTY, BLOCK, OWN, SHARED, GLOBAL = (
    ("white", BLUE), (PALE_BLUE, BLUE), (PALE_ORANGE, ORANGE), (PALE_GREEN, GREEN), (PALE_GREY, "black"),
)  # fmt: skip
Place = tuple[float, float, float, float]  # left, bottom, width, height


def _canvas(width: float, height: float, xlim: float, ylim: float) -> tuple[Figure, Axes]:
    fig, ax = plots.figure(width=width, height=height)
    ax.set(xlim=(0, xlim), ylim=(0, ylim))
    ax.set_axis_off()
    return fig, ax


def _box(ax: Axes, place: Place, kind: tuple[str, str], text: str = "", size: float = 8) -> None:
    x, y, w, h = place
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": kind[0], "edgecolor": kind[1]}
    ax.add_patch(FancyBboxPatch((x, y), w, h, linewidth=1.1, **style))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def _cell(ax: Axes, place: Place, fill: str, edge: str = "black", linewidth: float = 0.8) -> None:
    x, y, w, h = place
    ax.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge, linewidth=linewidth))


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "<->") -> None:
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": style, "lw": 1.2})


def _middle(ax: Axes, x: float, y: float, text: str, size: float = 8, **style) -> None:
    ax.text(x, y, text, ha="center", va="center", fontsize=size, **style)


def gpu_figure(blocks: int = 6, threads: int = 8) -> Figure:
    """A grid of blocks on the left, one of them opened on the right, global memory below both."""
    fig, ax = _canvas(8.6, 3.7, 17.2, 7.4)
    ax.text(0.2, 7.0, "grid: all blocks of one launch", fontsize=9)
    for n in range(blocks):
        x, y = 0.2 + 1.75 * (n % 3), 4.6 - 2.0 * (n // 3)
        _box(ax, (x, y, 1.55, 1.7), BLOCK if n == 2 else EMPTY)
        _middle(ax, x + 0.77, y + 1.4, f"block {n}")
        for i in range(threads):
            left, bottom = x + 0.32 + 0.3 * (i % 4), y + 0.63 - 0.4 * (i // 4)
            ax.plot([left, left], [bottom, bottom + 0.24], color=BLUE, linewidth=2)
    _box(ax, (6.6, 1.9, 10.4, 5.0), ("#f5f9fc", BLUE))
    for inner, outer in ((6.3, 6.9), (4.6, 1.9)):
        ax.plot([5.25, 6.6], [inner, outer], color=BLUE, linewidth=0.8, linestyle="--")
    ax.text(6.8, 6.5, "one block, opened: its threads run the same program", fontsize=9)
    wave = np.linspace(0, 1, 40)
    for i in range(threads):
        x = 7.37 + 1.25 * i
        _middle(ax, x, 6.05, f"thread {i}", 7.5)
        ax.plot(x + 0.1 * np.sin(14 * wave), 5.8 - 0.8 * wave, color=BLUE, linewidth=1.3)
        _box(ax, (x - 0.52, 4.1, 1.05, 0.75), OWN, "registers", 6.5)
        _arrow(ax, (x, 4.1), (x, 3.25))
    _box(ax, (6.85, 2.2, 9.8, 1.0), SHARED, "shared memory: small, quick, of this block alone", 9)
    _box(ax, (0.2, 0.1, 16.8, 1.0), GLOBAL, "global memory: large, slow, seen by all blocks; here lie the tensors", 9)
    _arrow(ax, (2.8, 2.55), (2.8, 1.15))
    _arrow(ax, (11.75, 2.15), (11.75, 1.15))
    return fig


def barrier_figure() -> Figure:
    """Four threads that write, meet at a barrier and read; and the same without the barrier."""
    work = (1.3, 2.2, 1.7, 2.9)
    fig, axes = plots.figure(width=8.2, height=2.4, cols=2, sharey=True)
    for ax, barrier in zip(axes, (True, False), strict=True):
        for i, spent in enumerate(work):
            y, start = 3 - i, max(work) if barrier else spent
            ax.barh(y, spent, height=0.55, color=PALE_BLUE, edgecolor=BLUE)
            _middle(ax, spent / 2, y, f"write x[{i}]", 7.5)
            if barrier and spent < max(work):
                ax.barh(y, max(work) - spent, left=spent, height=0.55, color="white", edgecolor="#888888", hatch="...")
            ax.barh(y, 1.2, left=start, height=0.55, color=PALE_ORANGE, edgecolor=ORANGE)
            _middle(ax, start + 0.6, y, f"read x[{(i + 3) % 4}]", 7.5)
        if barrier:
            ax.axvline(max(work), color="black", linewidth=2)
        else:
            ax.annotate("reads x[3], which is\nwritten only later", xy=(work[0] + 1.25, 3), xytext=(3.45, 3),
                        va="center", fontsize=7.5, arrowprops={"arrowstyle": "->", "lw": 1.2})
        ax.set(title="with a barrier" if barrier else "without", xlabel="time", xticks=[], xlim=(0, 5.1))
        ax.set_yticks(range(4), [f"thread {3 - y}" for y in range(4)])
        ax.grid(False)
    return fig


def mapping_figure(B: int, H: int, N: int) -> Figure:
    """Blocks for (b, h) on the left; the state of one block, a thread a column, on the right."""
    fig, ax = _canvas(8.8, 3.6, 17.8, 7.2)
    side, chosen, mine = min(1.5, 5.4 / H), (B - 1) * H + H // 2, min(2, N - 1)
    ax.text(0.2, 6.8, f"grid: B H = {B * H} blocks", fontsize=9)
    for b in range(B):
        for h in range(H):
            place = (0.9 + side * h, 5.7 - side * (b + 1), side - 0.12, side - 0.12)
            _box(ax, place, BLOCK if b * H + h == chosen else EMPTY, f"block {b * H + h}", 7.5)
        ax.text(0.75, 5.7 - side * (b + 0.55), f"b={b}", ha="right", va="center", fontsize=8)
    for h in range(H):
        _middle(ax, 0.9 + side * (h + 0.46), 6.0, f"h={h}")
    left, bottom, cell = 8.6, 0.9, min(0.62, 4.9 / N)
    right, height = left + cell * N, cell * N
    title = f"block {chosen}: the state S of b = {chosen // H}, h = {chosen % H}; {N} threads, a column each"
    ax.text(7.3, 6.8, title, fontsize=9)
    for i in range(N):
        for j in range(N):
            place = (left + cell * i, bottom + cell * j, cell, cell)
            _cell(ax, place, PALE_ORANGE if i == mine else "white", "#777777", 0.6)
        _middle(ax, left + cell * (i + 0.5), bottom - 0.25, str(i), 7)
    _middle(ax, left + height / 2, bottom - 0.72, "thread i = value channel")
    _middle(ax, left - 0.25, bottom + height / 2, "key channel j", rotation=90)
    _box(ax, (left + cell * mine, bottom + height + 0.15, cell, 0.42), OWN, "v[i]", 6.5)
    for n, name in enumerate(("r", "k", "u", "d")):
        _box(ax, (right + 0.55 + 0.62 * n, bottom, 0.5, height), SHARED, name, 9)
    words = {"shared memory:\nall threads need\nall of r, k, u, d": (0.68, "#006b4e"),
             "registers:\nonly thread i needs\ncolumn i and v[i]": (0.25, "#963400")}
    for text, (y, colour) in words.items():
        ax.text(right + 3.1, bottom + height * y, text, fontsize=8, va="center", color=colour)
    return fig


def address_figure(T: int, H: int, N: int, b: int, h: int) -> Figure:
    """The numbers of one text of a (B, T, H, N) tensor in the order of memory; those of head h are marked."""
    fig, ax = _canvas(8.6, 1.75, T * H * N, 4)
    for t in range(T):
        begin = t * H * N
        for head in range(H):
            _cell(ax, (begin + head * N, 1.4, N, 1.2), PALE_BLUE if head == h else "white")
            _middle(ax, begin + (head + 0.5) * N, 2.0, f"h={head}", 7.5)
        ax.plot([begin, begin], [1.1, 3.0], color="black", linewidth=2)
        _middle(ax, begin + H * N / 2, 3.2, f"b={b}, t={t}", 8.5)
    _arrow(ax, (h * N, 0.35), (h * N, 1.4), "->")
    _middle(ax, h * N, 0.2, "first", 8.5)
    _arrow(ax, (h * N, 0.95), ((h + H) * N, 0.95))
    _middle(ax, (h + H / 2) * N, 0.45, f"step = H N = {H * N}", 8.5)
    return fig


def fragment_figure(lane: int = 5) -> Figure:
    """Which lane of a warp holds which entries of a 16 x 8 accumulator of the tensor cores; see kernels/emulate.h."""
    row, column = np.indices((16, 8))
    lanes = row % 8 * 4 + column // 2
    fig, ax = plots.figure(width=4.4, height=4.3)
    ax.imshow(lanes == lane, cmap=ListedColormap(["white", PALE_ORANGE]), aspect="auto", vmin=0, vmax=1)
    for (y, x), who in np.ndenumerate(lanes):
        _middle(ax, x, y, str(who), fontweight="bold" if who == lane else "normal")
    ax.set(xticks=range(8), yticks=range(16), xlabel="column", ylabel="row")
    ax.set_xticks(np.arange(-0.5, 8), minor=True)
    ax.set_yticks(np.arange(-0.5, 16), minor=True)
    ax.grid(False)
    ax.grid(which="minor", color="#999999", linewidth=0.5)
    ax.tick_params(which="both", length=0)
    return fig


def chain_figure(T: int = 32, L: int = 16) -> Figure:
    """Two lines of time: T small steps that wait for each other, and T / L chunks of L steps at once."""
    fig, ax = _canvas(8.6, 2.5, T + 6.5, 5)
    ax.text(0, 4.55, "plain: T steps, each waits for the one before", fontsize=9)
    for t in range(T):
        _cell(ax, (t + 0.08, 3.6, 0.84, 0.6), *BLOCK, 1.2)
    ax.text(T + 0.4, 3.9, f"{T} steps", fontsize=9, va="center")
    ax.text(0, 2.75, f"in chunks: {L} steps as products of matrices, then the state once", fontsize=9)
    for c in range(T // L):
        for line in range(L):
            _cell(ax, (3.6 * c + 0.1, 0.15 + 2.2 * line / L, 2.1, 1.7 / L), *BLOCK, 0.5)
        _cell(ax, (3.6 * c + 2.35, 0.15, 0.9, 2.2), *OWN, 1.2)
        _middle(ax, 3.6 * c + 2.8, 1.25, "S", 9)
    ax.text(3.6 * (T // L) + 0.4, 1.25, f"{T // L} chunks", fontsize=9, va="center")
    return fig
