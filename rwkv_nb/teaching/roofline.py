"""The roofline of notebook 05: what a GPU can do at most, and where a kernel stands below that roof.

    roof = Roof("H200", 4.8e12, {"float32": 67e12})
    roof.reachable(8.0, "float32")          operations a second at 8 operations per byte: here memory is the limit

What it is not: a prediction of run time. A kernel may stay far below its roof, for instance because its steps wait for
each other.
Source: Williams, Waterman and Patterson, "Roofline" (Communications of the ACM, 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from rwkv_nb.teaching import plots


@dataclass(frozen=True)
class Roof:
    """What a GPU can do at most: bytes moved and operations made in a second."""

    name: str
    bytes_per_second: float
    operations_per_second: dict[str, float]  # kind of unit -> operations a second

    def ridge(self, unit: str) -> float:
        """Operations per byte from which on arithmetic, not memory, is the limit."""
        return self.operations_per_second[unit] / self.bytes_per_second

    def reachable(self, intensity: float | np.ndarray, unit: str) -> float | np.ndarray:
        """Operations a second that a kernel with this many operations per byte can reach at most."""
        return np.minimum(intensity * self.bytes_per_second, self.operations_per_second[unit])


def roofline_figure(
    roof: Roof, kernels: Sequence[tuple[str, float, str]], span: tuple[float, float] = (1, 1000)
) -> Figure:
    """Operations a second against operations per byte. kernels: (name, operations per byte, the unit that computes)."""
    fig, ax = plots.figure(width=7.5, height=3.6)
    x = np.geomspace(*span, 300)
    for i, (unit, most) in enumerate(roof.operations_per_second.items()):
        ax.loglog(x, roof.reachable(x, unit) / 1e12, **plots.line(i))
        ax.text(span[1], most / 1e12 * 1.12, unit, ha="right", va="bottom", fontsize=8, color=plots.COLOURS[i])
    for n, (name, intensity, unit) in enumerate(kernels):
        y = roof.reachable(intensity, unit) / 1e12
        ax.plot([intensity], [y], "osD^vP"[n % 6], markersize=8, color="black", markerfacecolor="#fbe3d0", label=name)
    top = max(roof.operations_per_second.values()) / 1e12
    ax.set(
        xlabel="operations per byte of global memory",
        ylabel="10¹² operations a second, at most",
        xlim=span,
        ylim=(roof.bytes_per_second * span[0] / 1e12 / 2, top * 3),
    )
    ax.legend(loc="lower right", fontsize=8)
    return fig
