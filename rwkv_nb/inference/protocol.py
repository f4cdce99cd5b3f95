"""What everything that writes is called like: `RWKV`, `Decoder`, `PackageEngine`, as a type for annotations.

What it is not: a base class; none of the three inherits from it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from rwkv_nb.model.config import ModelConfig


class Engine(Protocol):
    """(idx (B, T), state) -> (logits (B, T, V), or (B, 1, V) with full_output=False; the state after them)."""

    config: ModelConfig
    training: bool
    emb: nn.Embedding | Tensor  # its `weight.device` is where idx belongs

    def __call__(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]: ...
