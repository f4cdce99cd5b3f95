"""Pictures and the panel of notebook 10: who reads what, gradients averaged, memory by strategy, and a planner.

What it is not: the arithmetic (rwkv_nb.training.planner) or the walk (rwkv_nb.data.magic_prime); both are only drawn.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import Panel, number_and_slider
from rwkv_nb.training import planner
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.planner import GB, GPUS, SIZES, Memory, Plan

STRATEGIES = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
              "deepspeed_stage_3_offload", "fsdp")  # fmt: skip
CELL = "border:1px solid #888; padding:0.15em 0.6em; text-align:right"


def shares_figure(chunks: Sequence[Sequence[int]], p: int, columns: int = 24) -> Figure:
    """The data as a map of p squares, row by row; each square read bears the mark of the rank that read it.

    chunks: for each rank, the chunks that it read, in order.
    """
    rows = -(-p // columns)
    fig, ax = plots.figure(height=0.3 * rows + 1)
    for chunk in range(p):
        ax.add_patch(_square(chunk, columns, facecolor="#f2f2f2", edgecolor="white"))
    for rank, mine in enumerate(chunks):
        style = {"facecolor": plots.COLOURS[rank], "hatch": plots.HATCHES[rank], "edgecolor": "white"}
        for i, chunk in enumerate(mine):
            ax.add_patch(_square(chunk, columns, label=None if i else f"rank {rank}", **style))
            x, y = chunk % columns + 0.5, chunk // columns + 0.5
            ax.text(x, y, str(rank), ha="center", va="center", color="black", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], xlabel="chunks of the data, row by row")
    ax.grid(False)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(chunks))
    return fig


def _square(chunk: int, columns: int, **style: object):
    from matplotlib.patches import Rectangle

    return Rectangle((chunk % columns, chunk // columns), 1, 1, **style)


def gradients_figure(own: Sequence[Sequence[float]], averaged: Sequence[float], channels: int = 12) -> Figure:
    """Bars for the first channels: the gradient of each rank alone, and a line at what the optimizer was given."""
    fig, ax = plots.figure(height=2.8)
    width, x = 0.8 / len(own), np.arange(channels)
    for rank, gradient in enumerate(own):
        ax.bar(x + (rank - (len(own) - 1) / 2) * width, np.array(gradient[:channels]) * 1e3, width,
               label=f"rank {rank} alone", **plots.bar(rank))  # fmt: skip
    for i in range(channels):
        label = None if i else "what both ranks got"
        ax.plot([i - 0.45, i + 0.45], [averaged[i] * 1e3] * 2, color="black", linewidth=2.5, label=label)
    ax.set(xlabel="channel of ln_out.weight", ylabel="gradient (thousandths)", xticks=x)
    ax.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return fig


def memory_figure(bars: dict[str, Memory], limits: Sequence[float] = (), width: float = 7.5) -> Figure:
    """Stacked bars, one for each label, in GB on one device; dashed lines at `limits` (bytes)."""
    fig, ax = plots.figure(width=width, height=0.38 * len(bars) + 1.3)
    labels = list(bars)
    for i, part in enumerate(next(iter(bars.values())).parts()):
        sizes = np.array([bars[label].parts()[part] / GB for label in labels])
        left = np.array([sum(list(bars[label].parts().values())[:i]) / GB for label in labels])
        if sizes.any():
            ax.barh(labels, sizes, left=left, label=part, **plots.bar(i))
    for limit in limits:
        ax.axvline(limit / GB, color="black", linestyle="--", linewidth=1)
        ax.text(limit / GB, -0.75, f" {limit / GB:.0f} GB", va="center", fontsize=9)
    ax.set(xlabel="GB on each device", ylim=(len(labels) - 0.4, -1.1))
    fig.legend(ncols=6, loc="outside lower center", handlelength=1.5, columnspacing=1.2)
    return fig


def plan_of(size: str, gpu: str, devices: int, strategy: str, micro_bsz: int, ctx_len: int, grad_cp: bool,
            tokens: float, utilisation: float, scaling: float, price: float) -> Plan:  # fmt: skip
    """The planner's answer for a model by its name in SIZES and a GPU by its name in GPUS."""
    model = planner.model_of(size, ctx_len)
    cfg = TrainConfig(n_layer=model.n_layer, n_embd=model.n_embd, vocab_size=model.vocab_size, ctx_len=ctx_len,
                      micro_bsz=micro_bsz, devices=devices, strategy=strategy, precision="bf16",
                      grad_cp=int(grad_cp))  # fmt: skip
    return planner.plan_run(cfg, GPUS[gpu], tokens, utilisation, scaling, price)


def plan_html(plan: Plan) -> str:
    """Memory part by part, whether it fits, and speed, time and cost."""
    parts = "".join(f"<tr><th style='{CELL}'>{name}</th><td style='{CELL}'>{size / GB:.2f} GB</td></tr>"
                    for name, size in plan.memory.parts().items())  # fmt: skip
    room = f"{plan.memory.total / GB:.1f} of {plan.device.memory / GB:.0f} GB on each {plan.device.name}"
    verdict = "fits, with a tenth to spare" if plan.fits else "does NOT fit with a tenth to spare"
    host = f"; {plan.memory.host / GB:.1f} GB of RAM for each" if plan.memory.host else ""
    run = (f"{plan.tokens_per_second / 1000:,.1f} thousand tokens a second together; {plan.tokens / 1e9:,.2f} thousand "
           f"million tokens in {plan.hours:,.1f} hours ({plan.hours / 24:,.1f} days), "
           f"{plan.hours * plan.devices:,.0f} device hours, cost {plan.cost:,.0f}")  # fmt: skip
    return (f"<table style='border-collapse:collapse'>{parts}</table><p><b>{html.escape(room)}: {verdict}</b>{host}<br>"
            f"{run}</p>")


def panel() -> Panel:
    """Change model, GPU, strategy and assumptions; see memory, time and cost. A model brings its usual utilisation.

    Attributes: the controls size, gpu, strategy, devices, micro_bsz, ctx_len, grad_cp, tokens, utilisation, scaling,
    price, and the results report (HTML) and picture (Image).
    """
    label = {"style": {"description_width": "initial"}}
    size = ipywidgets.Dropdown(options=list(SIZES), value="0.1B", description="model", **label)
    gpu = ipywidgets.Dropdown(options=list(GPUS), value="RTX 4090", description="device", **label)
    strategy = ipywidgets.Dropdown(options=STRATEGIES, value="ddp", description="--strategy", **label)
    devices, devices_slider = number_and_slider("devices in all", 1, 1, 256)
    micro_bsz, micro_slider = number_and_slider("--micro_bsz", 16, 1, 64)
    ctx_len, ctx_slider = number_and_slider("--ctx_len", 512, 128, 8192, 128)
    grad_cp = ipywidgets.Checkbox(value=False, description="--grad_cp 1", **label)
    tokens = ipywidgets.BoundedFloatText(value=1.498, min=0.001, max=1e5, description="tokens (10^9)", **label)
    utilisation = ipywidgets.BoundedFloatText(value=0.1, min=0.01, max=1, step=0.05, description="utilisation", **label)
    scaling = ipywidgets.BoundedFloatText(value=0.9, min=0.01, max=1, step=0.05, description="scaling", **label)
    price = ipywidgets.BoundedFloatText(value=0.5, min=0, max=100, step=0.1, description="price an hour", **label)
    report, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    box = ipywidgets.HBox
    rows = [box([size, gpu, strategy]), box([devices, devices_slider]), box([micro_bsz, micro_slider]),
            box([ctx_len, ctx_slider]), box([grad_cp, tokens]), box([utilisation, scaling, price])]  # fmt: skip
    result = Panel("Planner of a run", [*rows, report, picture])
    controls = {"size": size, "gpu": gpu, "strategy": strategy, "devices": devices, "micro_bsz": micro_bsz,
                "ctx_len": ctx_len, "grad_cp": grad_cp, "tokens": tokens, "utilisation": utilisation,
                "scaling": scaling, "price": price}  # fmt: skip
    for name, control in controls.items():
        setattr(result, name, control)
    result.report, result.picture = report, picture

    def update(_change: object = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        plan = plan_of(**{**values, "tokens": tokens.value * 1e9})
        report.value = plan_html(plan)
        picture.value = plots.png(memory_figure({strategy.value: plan.memory}, [plan.device.memory]))

    def usual(_change: object) -> None:
        utilisation.value = planner.usual_utilisation(planner.model_of(size.value))

    size.observe(result.guard(usual), names="value")
    for control in controls.values():
        control.observe(result.guard(update), names="value")
    result.guard(update)()
    return result
