"""The planner of notebook 09: a strategy is typed, and bars show which bytes lie where, and whether they fit.

    plan_of("cuda fp16i8 *20 -> cpu fp32", "7B", MACHINES["RTX 4090"])     a MemoryPlan, or StrategyError
    figure(needed, machine)                                                  layers as a strip, devices as bars
    panel()                                                                  the same to play with

What it is not: the arithmetic (rwkv_nb.inference.memory) or its tables (rwkv_nb.inference.report).
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rwkv_nb.inference import report
from rwkv_nb.inference.devices import this_machine
from rwkv_nb.inference.engine import ours_can
from rwkv_nb.inference.memory import OURS, SPARE, UNPACKING, Device, MemoryPlan, best_strategy, find_device, memory_plan
from rwkv_nb.inference.strategy import StrategyError, parse_strategy
from rwkv_nb.teaching import plots
from rwkv_nb.teaching.model_sizes import OFFICIAL, official
from rwkv_nb.teaching.widgets import Panel

GB = 1e9
DEVICES = ("cpu", "cuda", "cuda:1")
HERE, OWN = "this machine", "as typed below"
# Memory and bandwidth as on data sheets; a processor's bandwidth is what a desktop or laptop of its kind reads.
MACHINES = {
    "laptop": {"cpu": Device(16 * GB, 40 * GB)},
    "RTX 4060": {"cpu": Device(32 * GB, 50 * GB), "cuda": Device(8 * GB, 272 * GB)},
    "two RTX 3060": {"cpu": Device(32 * GB, 50 * GB), **{d: Device(12 * GB, 360 * GB) for d in DEVICES[1:]}},
    "RTX 4090": {"cpu": Device(64 * GB, 60 * GB), "cuda": Device(24 * GB, 1008 * GB, bus=25 * GB)},
    "M2 Ultra": {"cpu": Device(192 * GB, 800 * GB)},
}
PARTS = ("weights", "streamed weights", "state")
CELL = "border:1px solid #888; padding:0.15em 0.6em; text-align:right"


def plan_of(text: str, size: str, machine: dict[str, Device], ours: bool = True) -> MemoryPlan:
    """The plan of a strategy for a World model by its name; "auto" asks for the best one.

    ours: 8 bits on a processor are our decoder's work, which needs a C++ compiler; else the package's, far slower.
    Raises StrategyError for what is no strategy; ValueError if nothing fits.
    """
    config = official(size)
    if text.strip() == "auto":
        best = best_strategy(config, machine, OURS if ours else UNPACKING)
        if best is None:
            raise ValueError(f"nothing fits: the {size} model has {config.n_params:,} parameters")
        return best
    plan = parse_strategy(text, config.n_layer)
    return memory_plan(plan, config, OURS if ours and ours_can(plan) else UNPACKING)


def bars(needed: MemoryPlan) -> dict[str, tuple[float, ...]]:
    """Device -> bytes of each of PARTS; what is streamed lies in the computer's memory."""
    streamed = sum(needed.streamed.values())
    found = {}
    for name in needed.weights:
        waiting = streamed if name == "cpu" else 0
        found[name] = (needed.weights[name] - waiting, waiting, needed.state.get(name, 0))
    return found


def figure(needed: MemoryPlan, machine: dict[str, Device]) -> Figure:
    """Above, every place in a row with its device; below, bytes on each device, and a line at what it may hold."""
    found = bars(needed)
    names = [*found, *(name for name in machine if name not in found)]
    sizes = {"height_ratios": [1, 0.55 * len(names) + 0.6]}
    fig, (top, ax) = plots.figure(height=0.42 * len(names) + 2.1, rows=2, gridspec_kw=sizes)
    _strip(top, needed)
    for i, part in enumerate(PARTS):
        values = [found.get(name, (0, 0, 0)) for name in names]
        if any(row[i] for row in values):
            ax.barh(names, [row[i] / GB for row in values], left=[sum(row[:i]) / GB for row in values], label=part,
                    height=0.6, **plots.bar(i))  # fmt: skip
        else:
            ax.barh(names, [0] * len(names))
    lacking = needed.lacking(machine)
    for y, name in enumerate(names):
        device = find_device(machine, name)
        limit = device.memory * (1 - SPARE) / GB if device else 0.0
        ax.plot([limit, limit], [y - 0.42, y + 0.42], color="black", linewidth=2)
        end = max(limit, sum(found.get(name, ())) / GB)
        verdict = "not in this machine" if not device else "does not fit" if name in lacking else "fits"
        ax.text(end, y, f" {verdict if name in found else 'unused'}", va="center", fontsize=9)
    _, right = ax.get_xlim()
    ax.set(xlabel=f"GB; black: memory less {SPARE:.0%}", ylim=(len(names) - 0.5, -0.5), xlim=(0, right * 1.15))
    ax.grid(axis="y")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS))
    return fig


def _strip(ax, needed: MemoryPlan) -> None:
    """A square for each place: its device by colour, 8 bits hatched, streamed ones pale."""
    devices = needed.plan.devices
    for place in needed.plan.places:
        style = {"facecolor": plots.COLOURS[(3 + devices.index(place.device)) % 6], "edgecolor": "white"}
        style |= {"hatch": "//"} if place.eight_bit else {}
        style |= {"alpha": 0.45} if place.streamed else {}
        ax.add_patch(Rectangle((place.index, 0), 0.94, 1, **style))
    for device in devices:
        mine = [place.index for place in needed.plan.places if place.device == device]
        ax.text(mine[0], 1.12, device, fontsize=8, va="bottom")
    n = len(needed.plan.places)
    ax.text(n, 0.5, " head", fontsize=8, va="center")
    ax.set(xlim=(0, n + 2.5), ylim=(0, 1.6), yticks=[], xticks=[], title=needed.plan.text)
    ax.set_axis_off()


def marked(error: StrategyError) -> str:
    """The strategy as HTML with the wrong place marked, and what is wrong."""
    before, wrong, after = (html.escape(part) for part in (
        error.text[: error.at], error.text[error.at : error.at + error.length] or "␣",
        error.text[error.at + error.length :]))  # fmt: skip
    return (f"<p><b>not a strategy</b>, character {error.at + 1}: {html.escape(error.reason)}</p>"
            f"<pre>{before}<mark style='background:#ffd24d'><u>{wrong}</u></mark>{after}</pre>")  # fmt: skip


def verdict_html(needed: MemoryPlan, machine: dict[str, Device]) -> str:
    """Whether it fits and how fast it can be, with the notes of the plan."""
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in needed.plan.notes)
    return f"<p><b>{html.escape(report.verdict(needed, machine))}</b></p>{notes}"


def tables_html(needed: MemoryPlan, machine: dict[str, Device]) -> str:
    """The two tables of `report.text`."""
    return (_table(report.DEVICES, report.device_rows(needed, machine)) + "<br>"
            + _table(report.PLACES, report.place_rows(needed)))  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th scope='col' style='{CELL}'>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td style='{CELL}'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                   for row in rows)  # fmt: skip
    return f"<table style='border-collapse:collapse'><tr>{first}</tr>{body}</table>"


def panel(text: str = "cuda fp16", size: str = "7B", machine: str = "RTX 4090") -> Panel:
    """Edit a strategy and a machine; see bytes, whether they fit, and the speed.

    Attributes: the controls strategy, size, preset, memory and bandwidth (by device), bus, ours, best (a button), and
    the results verdict (HTML), picture (Image) and report (HTML). A device with 0 GB is not there.
    """
    label = {"style": {"description_width": "initial"}}
    wide = ipywidgets.Layout(width="95%")
    strategy = ipywidgets.Text(value=text, description="strategy", layout=wide, **label)
    sizes = ipywidgets.Dropdown(options=list(OFFICIAL), value=size, description="World model", **label)
    preset = ipywidgets.Dropdown(options=[*MACHINES, HERE, OWN], value=machine, description="machine", **label)
    best = ipywidgets.Button(description="best strategy for this memory", layout=ipywidgets.Layout(width="auto"))
    ours = ipywidgets.Checkbox(value=True, description="8 bits on cpu by our decoder", indent=False)
    narrow = ipywidgets.Layout(width="13em")

    def number(description: str) -> ipywidgets.BoundedFloatText:
        return ipywidgets.BoundedFloatText(value=0, min=0, max=1e5, description=description, layout=narrow, **label)

    memory = {name: number(f"{name} GB") for name in DEVICES}
    bandwidth = {name: number(f"{name} GB/s") for name in DEVICES}
    bus = number("bus GB/s")
    verdict, tables, picture = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.Image(format="png")
    rows = [[sizes, preset], [*memory.values(), bus], [*bandwidth.values()], [strategy], [best, ours]]
    rows = [ipywidgets.HBox(row) for row in rows]
    result = Panel("Planner of a strategy", [*rows, verdict, picture, tables])
    result.strategy, result.size, result.preset, result.best = strategy, sizes, preset, best
    result.memory, result.bandwidth, result.bus, result.ours = memory, bandwidth, bus, ours
    result.verdict, result.picture, result.report = verdict, picture, tables
    filling = []  # not empty while a preset fills the boxes

    def typed() -> dict[str, Device]:
        speed = {name: max(box.value, 0.001) * GB for name, box in {**bandwidth, "bus": bus}.items()}
        return {name: Device(memory[name].value * GB, speed[name], speed["bus"])
                for name in DEVICES if memory[name].value > 0}  # fmt: skip

    def update(change: dict | None = None) -> None:
        if filling:
            return
        if change and change["owner"] not in (strategy, sizes, ours):
            preset.value = OWN
        here = typed()
        try:
            needed = plan_of(strategy.value, sizes.value, here, ours.value)
        except StrategyError as error:
            verdict.value, tables.value = marked(error), ""
        else:
            verdict.value, tables.value = verdict_html(needed, here), tables_html(needed, here)
            picture.value = plots.png(figure(needed, here))

    def fill(_change: object = None) -> None:
        if preset.value == OWN:
            return
        chosen = this_machine() if preset.value == HERE else MACHINES[preset.value]
        filling.append(True)
        for name in DEVICES:
            device = find_device(chosen, name)
            memory[name].value = round(device.memory / GB, 1) if device else 0
            bandwidth[name].value = round(device.bandwidth / GB, 1) if device else 0
        bus.value = max(device.bus / GB for device in chosen.values())
        filling.clear()
        update()

    def choose(_button: object) -> None:
        strategy.value = plan_of("auto", sizes.value, typed(), ours.value).plan.text

    for control in (strategy, sizes, ours, bus, *memory.values(), *bandwidth.values()):
        control.observe(result.guard(update), names="value")
    preset.observe(result.guard(fill), names="value")
    best.on_click(result.guard(choose))
    result.guard(fill)()
    return result
