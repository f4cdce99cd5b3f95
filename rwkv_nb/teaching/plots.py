"""Figures in one style: readable in grey, in print and in the dark mode of JupyterLab, each with alt text.

    fig, ax = plots.figure(height=3)
    ax.plot(x, y, **plots.line(0), label="train")
    plots.show(fig, "Training loss falls from 11 to 6 in 100 steps.")

`show` writes the alt text into the notebook twice: as the picture's `alt` attribute for screen readers, and as its
text/plain form, which text viewers display and `pytest --nbval` compares. So alt text must not vary between runs.
"""

from __future__ import annotations

import base64
import io
from itertools import count

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: distinct for every kind of colour vision. Order: also distinct in lightness for neighbours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), "-")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++")
COLOUR_MAP = "cividis"  # for heat maps: monotone in lightness

_live_ids = count()


def use_style() -> None:
    """Set matplotlib's defaults for this kernel."""
    plt.rcParams.update({
        "figure.facecolor": "white",  # opaque: dark mode must not swallow black axes
        "savefig.facecolor": "white",
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "image.cmap": COLOUR_MAP,
    })


def figure(
    width: float = 7.5, height: float = 3.2, rows: int = 1, cols: int = 1, **kwargs: object
) -> tuple[Figure, Axes]:
    """A figure of `width` by `height` inches that is not shown by itself; `show` does that."""
    use_style()
    fig, axes = plt.subplots(rows, cols, figsize=(width, height), **kwargs)
    plt.close(fig)  # else the inline backend would show it a second time, without alt text
    return fig, axes


def line(i: int) -> dict:
    """Keyword arguments for the i-th curve: colour and dash differ together, so that grey print can tell them apart."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def bar(i: int) -> dict:
    """Keyword arguments for the i-th group of bars: colour and hatch differ together."""
    return {"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white"}


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes (also what a widget's `Image(value=...)` takes)."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    return buffer.getvalue()


def _bundle(fig: Figure, alt: str) -> tuple[dict, dict]:
    if not alt.strip():
        raise ValueError("plots.show: alt text is empty; say in a sentence what to see in the figure")
    return {"image/png": base64.b64encode(png(fig)).decode(), "text/plain": alt}, {"image/png": {"alt": alt}}


def show(fig: Figure, alt: str) -> None:
    """Display `fig` with `alt`, a sentence that says what to see in it. Raises ValueError if alt is empty."""
    data, metadata = _bundle(fig, alt)
    display(data, metadata=metadata, raw=True)


class LiveFigure:
    """A figure that is redrawn in place while a cell runs; the last state is what a saved notebook shows.

    Only the picture changes between updates: the alt text stays, so that strict nbval can compare it.
    """

    def __init__(self, fig: Figure, alt: str):
        self.fig, self.alt = fig, alt
        data, metadata = _bundle(fig, alt)
        self._handle = display(data, metadata=metadata, raw=True, display_id=f"live-{next(_live_ids)}")

    def update(self) -> None:
        """Draw the figure as it is now."""
        data, metadata = _bundle(self.fig, self.alt)
        self._handle.update(data, metadata=metadata, raw=True)
