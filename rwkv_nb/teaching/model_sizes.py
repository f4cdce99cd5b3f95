"""What a model of given sizes consists of: parameters, arithmetic and memory, part by part (notebook 06).

    for part in parts(ModelConfig(12, 768, 65536)):
        print(part.name, part.parameters, part.operations)

Operations are those of one token going forward; a multiplication and an addition count as two. A matrix of R by C
numbers costs 2 R C; WKV-5 costs 4 for each of the A N numbers of a layer's state, two to read it and two to update it.
Training costs about three times as much: backward, each product of matrices becomes two.

What it is not: a measurement. Norms, mixes and activations are counted as parameters, but not as operations: there are
a few of them for each number of x, against thousands in the matrices. Symbols: as in `rwkv_nb.model.config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rwkv_nb.model.config import WORLD_SIZES as OFFICIAL
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import parameter_shapes

TRAINING_BYTES = 16  # a parameter in float32 training: itself, its gradient, and two averages of Adam, 4 bytes each


@dataclass(frozen=True)
class Part:
    """One part of the model, in all layers together."""

    name: str
    parameters: int
    operations: int  # a token, forward


def official(name: str) -> ModelConfig:
    """The sizes of an official World model, by a name of OFFICIAL."""
    n_layer, n_embd = OFFICIAL[name]
    return ModelConfig(n_layer, n_embd, 65536)


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in checkpoints."""
    inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
    first = inner.split(".")[0]
    if first.startswith("ln"):
        return "norms"
    return {"emb": "embedding", "att": "time mixing", "ffn": "channel mixing", "head": "head"}.get(first, "options")


def parts(config: ModelConfig) -> list[Part]:
    """Every part with its numbers; the parameters sum to `config.n_params`."""
    names = ["embedding", "time mixing", "WKV-5", "channel mixing", "norms", "head", "options"]
    parameters, operations = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for name, shape in parameter_shapes(config).items():
        part = part_of(name)
        parameters[part] += math.prod(shape)
        if len(shape) == 2 and name.endswith(".weight") and part != "embedding":  # a row of emb is only looked up
            operations[part] += 2 * math.prod(shape)
    operations["WKV-5"] = 4 * config.dim_att * config.head_size_a * config.n_layer
    found = [Part(name, parameters[name], operations[name]) for name in names]
    return [part for part in found if part.parameters or part.operations]


def state_numbers(config: ModelConfig) -> int:
    """Numbers in the state of one text: for each layer twice D for token shift, and N by N for each head."""
    return config.n_layer * (2 * config.n_embd + config.dim_att * config.head_size_a)
