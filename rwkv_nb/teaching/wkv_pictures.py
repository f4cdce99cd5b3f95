"""Heat maps and diagrams of notebook 04: matrices with letters at their edges, and which pairs of steps go where.

What it is not: the panel (rwkv_nb.teaching.widgets.wkv) or the style of all figures (rwkv_nb.teaching.plots).
Symbols: A[t, s] the weight with which step t reads step s; T steps, L the length of a chunk.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from rwkv_nb.teaching import plots

NUMBERS_UP_TO = 8  # matrices with at most so many columns get their entries written into the cells


def visible(text: str) -> str:
    """Blanks and line ends as signs that can be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎")


def heat(
    ax: Axes,
    matrix: np.ndarray,
    rows: tuple[str, ...] | str = "",
    columns: tuple[str, ...] | str = "",
    limit: float | None = None,
    signed: bool = False,
) -> AxesImage:
    """Draw a matrix. rows, columns: a letter for each, or a name for the axis. limit: what the brightest colour means.

    signed: the scale runs from -limit to limit, and zero is the middle tone.
    """
    matrix = np.asarray(matrix)
    limit = limit or float(np.abs(matrix).max()) or 1.0
    image = ax.imshow(matrix, vmin=-limit if signed else 0, vmax=limit, aspect="auto", interpolation="nearest")
    ax.grid(False)
    for labels, ticks, name in ((rows, ax.set_yticks, ax.set_ylabel), (columns, ax.set_xticks, ax.set_xlabel)):
        if isinstance(labels, str):
            ticks([])
            name(labels)
        else:
            ticks(range(len(labels)), [visible(c) for c in labels], fontsize=9 if len(labels) < 20 else 7)
    if matrix.shape[1] <= NUMBERS_UP_TO and not signed:
        for (j, i), value in np.ndenumerate(matrix):
            if value >= 0.005 * limit:
                colour = "black" if value > 0.6 * limit else "white"
                ax.text(i, j, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=8)
    return image


def matrix_figure(matrix: np.ndarray, rows, columns, ylabel: str, xlabel: str, width: float = 4.6) -> Figure:
    """One labelled matrix."""
    fig, ax = plots.figure(width=width, height=3.3)
    image = heat(ax, matrix, rows, columns, signed=bool(np.asarray(matrix).min() < 0))
    ax.set(ylabel=ylabel, xlabel=xlabel)
    fig.colorbar(image, ax=ax, shrink=0.9)
    return fig


def weights_figure(A: np.ndarray, text: str) -> Figure:
    """The T x T weights of a text: row t reads, column s is read."""
    fig, ax = plots.figure(width=6.4, height=5.2)
    image = heat(ax, A, tuple(text), tuple(text))
    for edge in range(len(text)):  # a faint stair: what lies to its right is the future
        ax.plot([edge + 0.5] * 2, [edge - 0.5, edge + 0.5], color="white", linewidth=0.8)
        ax.plot([edge + 0.5, edge + 1.5], [edge + 0.5] * 2, color="white", linewidth=0.8)
    ax.set(ylabel="letter t, which reads", xlabel="letter s, whose value it gets",
           xlim=(-0.5, len(text) - 0.5), ylim=(len(text) - 0.5, -0.5))
    fig.colorbar(image, ax=ax, shrink=0.8, label="weight A[t, s]")
    return fig


def chunks_figure(T: int, L: int) -> Figure:
    """Which part of the T x T matrix the chunked form computes as a matrix, and which goes through the state."""
    t, s = np.indices((T, T))
    kind = np.where(s > t, 0, np.where(t // L == s // L, 2, 1))
    fig, ax = plots.figure(width=4.6, height=4)
    ax.imshow(kind, cmap=ListedColormap(["#ffffff", "#c9dcec", plots.COLOURS[0]]), vmin=0, vmax=2)
    for edge in np.arange(-0.5, T, 1):
        whole = int(edge + 0.5) % L == 0
        for draw in (ax.axhline, ax.axvline):
            draw(edge, color="black" if whole else "#aaaaaa", linewidth=1.2 if whole else 0.3)
    for c in range(T // L):
        middle = (c + 0.5) * L - 0.5
        ax.text(middle - L * 0.12, middle + L * 0.14, "matrix", ha="center", va="center", color="white", fontsize=8)
        for other in range(c):
            before = (other + 0.5) * L - 0.5
            ax.text(before, middle, "through\nstate", ha="center", va="center", fontsize=8)
            ax.text(middle, before, "nothing", ha="center", va="center", fontsize=8, color="#666666")
    ax.set(xlabel="step s", ylabel="step t", xticks=range(0, T, L), yticks=range(0, T, L))
    ax.grid(False)
    return fig
