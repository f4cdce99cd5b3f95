"""The schedule panel of notebook 07: learning rate against step, as the flags say.

    schedule_figure({"cosine": cfg})       the whole run, and beside it its first steps
    panel(cfg)                             the same, with flags to move

What it is not: the schedule itself (`rwkv_nb.training.schedule`), which these functions only ask.
Symbols: a step is one update of the weights; lr the learning rate of a group with my_lr_scale 1.
"""

from __future__ import annotations

import html

import ipywidgets
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import Panel, number_and_slider
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.schedule import learning_rate

POINTS = 400  # of a drawn curve
CELL = "border:1px solid #888; padding:0.15em 0.6em; text-align:right"


def steps_of(cfg: TrainConfig) -> int:
    """Steps until the run ends by my_exit_tokens; without those, until the learning rate has come to its end."""
    if cfg.my_exit_tokens:
        return -(-abs(cfg.my_exit_tokens) // cfg.tokens_per_step)
    return cfg.epoch_count * cfg.steps_per_epoch


def curve(cfg: TrainConfig, last: int, points: int = POINTS) -> tuple[list[int], list[float]]:
    """Steps from 0 to `last`, at most `points` + 1 of them, evenly spread, and the learning rate of each."""
    some = sorted({round(last * i / points) for i in range(points + 1)})
    return some, [learning_rate(step, cfg) for step in some]


def first_steps(cfg: TrainConfig) -> int:
    """How many steps to look at closely: twice the warm-up, at least 20, never more than the run has."""
    return min(max(20, 2 * cfg.warmup_steps), steps_of(cfg))


def schedule_figure(runs: dict[str, TrainConfig]) -> Figure:
    """Learning rate of each run (label -> flags): left from the first step to the last, right the first steps."""
    fig, (whole, start) = plots.figure(width=8.4, height=3.2, cols=2, gridspec_kw={"width_ratios": [1.6, 1]})
    close = max(first_steps(cfg) for cfg in runs.values())
    for i, (label, cfg) in enumerate(runs.items()):
        whole.plot(*curve(cfg, steps_of(cfg)), **plots.line(i), label=label)
        start.plot(*curve(cfg, close), **plots.line(i), marker="." if close <= 40 else None)
    whole.set(xlabel="step", ylabel="learning rate", title="the whole run")
    start.set(xlabel="step", title="its first steps")
    whole.xaxis.set_major_locator(MaxNLocator(5))
    whole.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    for ax in (whole, start):
        ax.set_ylim(bottom=0)
    if len(runs) > 1:
        whole.legend(loc="best", fontsize=8)
    return fig


def moments(cfg: TrainConfig) -> list[tuple[str, int, float]]:
    """(what, step, learning rate) at the places of a schedule that a reader asks about, in their order."""
    total, warm = steps_of(cfg), max(0, cfg.warmup_steps)
    named = [("first step", 0), ("warm-up over", warm), ("quarter", total // 4), ("half", total // 2),
             ("three quarters", 3 * total // 4), ("last step", total - 1)]  # fmt: skip
    if not warm:
        named.pop(1)
    return [(what, step, learning_rate(step, cfg)) for what, step in sorted(named, key=lambda pair: pair[1])]


def report_html(cfg: TrainConfig) -> str:
    """The same as a table, with the number of steps; raises ConfigError for flags that no run can have."""
    cfg.validate()
    rows = "".join(
        f"<tr><th style='{CELL}'>{html.escape(what)}</th><td style='{CELL}'>{step:,}</td>"
        f"<td style='{CELL}'>{rate:.3g}</td></tr>"
        for what, step, rate in moments(cfg)
    )
    head = f"<tr><th></th><th style='{CELL}'>step</th><th style='{CELL}'>learning rate</th></tr>"
    length = f"{steps_of(cfg):,} steps of {cfg.tokens_per_step:,} tokens"
    notes = "".join(f"<br>note: {html.escape(note)}" for note in cfg.notes())
    return f"<p>{length}{notes}</p><table style='border-collapse:collapse'>{head}{rows}</table>"


def panel(cfg: TrainConfig) -> Panel:
    """Move the flags of the schedule and see table and curve. `cfg`: the run to start from.

    The controls are attributes of the Panel, by the names of the flags: lr_init, lr_final, warmup_steps,
    my_exit_tokens, my_pile_edecay, recipe; results: report (HTML), picture (Image).
    """
    label = {"style": {"description_width": "initial"}}
    rates = {
        name: ipywidgets.BoundedFloatText(value=getattr(cfg, name), min=0, max=1, step=1e-5, description=name, **label)
        for name in ("lr_init", "lr_final")
    }
    warm, warm_slider = number_and_slider("warmup_steps", max(0, cfg.warmup_steps), 0, 2000, step=10)
    tokens = ipywidgets.IntText(value=cfg.my_exit_tokens, description="my_exit_tokens (0: by mini-epochs)", **label)
    late = ipywidgets.BoundedIntText(value=cfg.my_pile_edecay, min=0, max=10**6, description="my_pile_edecay", **label)
    recipe = ipywidgets.Dropdown(value=cfg.recipe, options=["head", "seed"], description="recipe", **label)
    report, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    controls = {**rates, "warmup_steps": warm, "my_exit_tokens": tokens, "my_pile_edecay": late, "recipe": recipe}
    rows = [ipywidgets.HBox(list(rates.values())), ipywidgets.HBox([warm, warm_slider]),
            ipywidgets.HBox([tokens, late, recipe])]  # fmt: skip
    result = Panel("Schedule of the learning rate", [*rows, report, picture])
    result.report, result.picture = report, picture
    for name, control in controls.items():
        setattr(result, name, control)

    def update(_change: object = None) -> None:
        now = cfg.replace(**{name: control.value for name, control in controls.items()})
        text = report_html(now)  # first: impossible flags change nothing but the message
        drawn = plots.png(schedule_figure({"": now}))
        report.value, picture.value = text, drawn

    for control in controls.values():
        control.observe(result.guard(update), names="value")
    result.guard(update)()
    return result
