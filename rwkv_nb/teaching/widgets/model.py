"""The sizes panel of notebook 06: choose layers, width and vocabulary, see shapes, parameters, memory and arithmetic.

    rows(ModelConfig(12, 768, 65536))       the table, as plain tuples
    summary(ModelConfig(12, 768, 65536))    memory and arithmetic, as label -> text
    panel()                                 the same to play with

What it is not: the counting itself, which is `rwkv_nb.teaching.model_sizes`. Symbols: L layers, D n_embd, V vocabulary.
"""

from __future__ import annotations

import html

import ipywidgets

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import parameter_shapes
from rwkv_nb.teaching import plots
from rwkv_nb.teaching.model_pictures import shares_figure
from rwkv_nb.teaching.model_sizes import OFFICIAL, TRAINING_BYTES, part_of, parts, state_numbers
from rwkv_nb.teaching.widgets import Panel, number_and_slider

OWN = "sizes of my own"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(number: float, unit: str = "") -> str:
    """A number with three digits and a prefix: short(192_807_936, "B") == "193 MB"."""
    for size, prefix in UNITS:
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


def _matrices(config: ModelConfig, part: str) -> str:
    """The shapes of a part's matrices in one layer, such as "5 × (768, 768)"."""
    counts: dict[tuple[int, ...], int] = {}
    for name, shape in parameter_shapes(config).items():
        if part_of(name) == part and len(shape) == 2 and name.endswith(".weight"):
            counts[shape] = counts.get(shape, 0) + 1
    layers = 1 if part in ("embedding", "head") else config.n_layer
    each = {shape: count // layers for shape, count in counts.items()}
    return ", ".join(f"{count} × {shape}" if count > 1 else f"{shape}" for shape, count in each.items())


def rows(config: ModelConfig) -> list[tuple[str, str, int, int]]:
    """(part, its matrices in one layer, parameters in all layers, operations a token) for each part, then the sum."""
    shapes = {"WKV-5": f"state {config.n_head} × {(config.head_size_a,) * 2}", "norms": ""}
    table = [(p.name, shapes.get(p.name, _matrices(config, p.name)), p.parameters, p.operations)
             for p in parts(config)]
    return [*table, ("all", "", sum(row[2] for row in table), sum(row[3] for row in table))]


def summary(config: ModelConfig) -> dict[str, str]:
    """What the sizes mean for a machine: label -> amount."""
    total, operations = rows(config)[-1][2:]
    return {
        "file, 2 bytes a parameter (bfloat16)": short(2 * total, "B"),
        f"training, {TRAINING_BYTES} bytes a parameter, before activations": short(TRAINING_BYTES * total, "B"),
        "state of one text, float32, at any length": short(4 * state_numbers(config), "B"),
        "operations to read a token": short(operations),
        "operations to train on a token": short(3 * operations),
    }


def table_html(config: ModelConfig) -> str:
    """Both tables for the panel."""
    head = "<tr><th>part</th><th>matrices of a layer</th><th>parameters</th><th>operations a token</th></tr>"
    cell = "<td style='text-align:right;padding:0 8px'>"
    body = "".join(f"<tr><th scope='row'>{name}</th>{cell}{html.escape(shape)}</td>{cell}{parameters:,}</td>"
                   f"{cell}{operations:,}</td></tr>" for name, shape, parameters, operations in rows(config))
    lines = "".join(f"<tr><th scope='row'>{html.escape(label)}</th>{cell}{amount}</td></tr>"
                    for label, amount in summary(config).items())
    return f"<table>{head}{body}</table><br><table>{lines}</table>"


def panel(name: str = "0.1B") -> Panel:
    """Choose sizes; controls: size, layers, width, vocabulary; results: table (HTML), picture (Image)."""
    start = OFFICIAL[name]
    size = ipywidgets.Dropdown(options=[*OFFICIAL, OWN], value=name, description="World model",
                                style={"description_width": "initial"})
    layers, layers_slider = number_and_slider("layers L", start[0], 1, 64)
    width, width_slider = number_and_slider("width D (a multiple of 64)", start[1], 64, 8192, 64)
    vocabulary, _ = number_and_slider("vocabulary V", 65536, 2, 200_000)
    table, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    boxes = [ipywidgets.HBox(pair) for pair in ((layers, layers_slider), (width, width_slider))]
    result = Panel("Sizes of a model", [size, *boxes, vocabulary, table, picture])
    result.size, result.layers, result.width, result.vocabulary = size, layers, width, vocabulary
    result.table, result.picture = table, picture

    def draw(_change: object = None) -> None:
        table.value, picture.value = "", b""  # nothing old beside a message
        sizes = (layers.value, width.value)
        size.value = next((name for name, known in OFFICIAL.items()
                           if known == sizes and vocabulary.value == 65536), OWN)
        config = ModelConfig(*sizes, vocabulary.value)
        drawn = plots.png(shares_figure({"this model": config}))
        table.value, picture.value = table_html(config), drawn

    def choose(_change: object) -> None:
        if size.value != OWN:
            wanted = size.value
            vocabulary.value = 65536
            layers.value, width.value = OFFICIAL[wanted]

    for control in (layers, width, vocabulary):
        control.observe(result.guard(draw), names="value")
    size.observe(result.guard(choose), names="value")
    result.guard(draw)()
    return result
