"""Drawings that more than one page shows: the way from text to text, and the plot that grows while a model trains.

What it is not: the style of all figures, which is `plots`.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rwkv_nb.teaching import plots

STEPS = (
    ("text", "any .txt or .jsonl", ""),
    ("token ids", "a vocabulary", "01"),
    (".bin + .idx", "documents on disk", "02"),
    ("windows", "magic prime", "03"),
    ("RWKV-5", "state, not a cache", "04-06"),
    ("training", "next-token loss", "07, 10"),
    ("sampling", "probabilities", "08, 09"),
    ("text", "new, by the model", ""),
)


def pipeline() -> Figure:
    """The way from text to a model that writes, one box a step, with the notebooks that explain it."""
    fig, ax = plots.figure(width=9.2, height=1.9)
    ax.set_axis_off()
    ax.set_xlim(-0.1, len(STEPS))
    ax.set_ylim(0, 1)
    for i, (name, detail, lesson) in enumerate(STEPS):
        ends = i in (0, len(STEPS) - 1)
        box = {
            "boxstyle": "round,pad=0.5",
            "facecolor": "white" if ends else "#e8f1f8",
            "edgecolor": plots.COLOURS[0],
            "linewidth": 1.4,
            "linestyle": "--" if ends else "-",
        }
        ax.text(i + 0.42, 0.62, f"{name}", ha="center", va="center", bbox=box, fontsize=10)
        ax.text(i + 0.42, 0.33, detail, ha="center", va="center", fontsize=8)
        ax.text(i + 0.42, 0.13, lesson and f"notebook {lesson}", ha="center", va="center", fontsize=7, color="#555555")
        if i:
            ax.annotate("", xy=(i + 0.02, 0.62), xytext=(i - 0.18, 0.62), arrowprops={"arrowstyle": "->", "lw": 1.4})
    return fig


PIPELINE_ALT = (
    "Eight boxes in a row: text, token ids, .bin and .idx files, windows chosen by a magic prime, RWKV-5, "
    "training, sampling, and text again, each with the notebook that explains it."
)


class TrainingPlot:
    """Loss against training time, redrawn in place, beside horizontal lines for what simpler predictors reach.

    yardsticks: label -> bits per token, drawn as level lines. `record(r)` fits `Monitor(on_record=...)`.
    """

    def __init__(self, yardsticks: dict[str, float], unit: str = "bits per character", redraw_every: int = 2):
        self.seconds: list[float] = []
        self.bits: list[float] = []
        self.redraw_every = redraw_every
        self.fig, self.ax = plots.figure(width=7.5, height=3.4)
        self.ax.set(xlabel="training time (s)", ylabel=f"loss ({unit})")
        (self.curve,) = self.ax.plot([], [], **plots.line(0), label="the model, on the batches it trains on")
        for i, (label, bits) in enumerate(yardsticks.items(), start=1):
            self.ax.axhline(bits, **plots.line(i), linewidth=1.2, label=label)
        self.ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)  # above: no line crosses it
        alt = f"Training loss in {unit} falls with training time, past the levels of {' and '.join(yardsticks)}."
        self.live = plots.LiveFigure(self.fig, alt)

    def record(self, record) -> None:
        """Add one point (a record's loss is in nats) and redraw now and then."""
        self.seconds.append(record.seconds)
        self.bits.append(record.loss / 0.6931471805599453)  # nats to bits: divide by ln 2
        if len(self.bits) % self.redraw_every == 0:
            self.draw()

    def draw(self) -> None:
        """Redraw with everything recorded so far."""
        self.curve.set_data(self.seconds, self.bits)
        fit(self.ax, self.seconds, self.bits)
        self.live.update()


def fit(ax: Axes, x: list[float], y: list[float]) -> None:
    """Axis limits that hold the curve and the yardsticks, from zero."""
    if x:
        ax.set_xlim(0, max(x) * 1.02)
        ax.set_ylim(0, max(max(y), *(line.get_ydata()[0] for line in ax.get_lines()[1:]), 1.0) * 1.05)
