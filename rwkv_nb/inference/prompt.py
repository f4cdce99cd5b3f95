"""Reading a prompt with packed weights: the model in PyTorch, each block's matrices unpacked while it is at work.

What it is not: a second model. It is an RWKV whose matrices are empty until a block is called, so a prompt is read
time-parallel (one pass over the weights for all its tokens), and at most one block is unpacked at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV

from .packing import Packed

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PromptReader:
    """Called like an RWKV, without gradients.

    Args:
        weights: name -> tensor of everything that is not packed, float32 but for the embedding.
        matrices: name (without ".weight") -> packed matrix; what lies in float32 already is shared, not copied.
        products: "float32" or "bfloat16", what matrices are multiplied in. All else is float32.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], matrices: Mapping[str, Packed], products: str
    ):
        if products not in PRODUCTS:
            raise ValueError(f"products = {products!r}: choose from {', '.join(PRODUCTS)}")
        self.products, self.matrices = products, matrices
        bare = {f"{n}.weight": torch.empty(len(p.numbers), p.columns, device="meta") for n, p in matrices.items()}
        self.model = RWKV(config, {**bare, **weights}).eval().requires_grad_(False)
        self.model.emb.register_forward_hook(lambda module, inputs, out: out.float())
        linears = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        for prefix, module in self.model.named_modules():
            if module is self.model.head or module in list(self.model.blocks):
                parts = [(name, linear) for name, linear in linears.items() if f"{name}.".startswith(f"{prefix}.")]
                module.register_forward_pre_hook(lambda module, inputs, parts=parts: self._unpack(parts))
                module.register_forward_hook(lambda module, inputs, out, parts=parts: self._drop(parts))

    def _unpack(self, parts: list[tuple[str, nn.Module]]) -> None:
        for name, module in parts:
            matrix = self.matrices[name].unpack(PRODUCTS[self.products])
            module.weight = nn.Parameter(matrix, requires_grad=False)

    def _drop(self, parts: list[tuple[str, nn.Module]]) -> None:
        for _, module in parts:
            module.weight = nn.Parameter(torch.empty(module.weight.shape, device="meta"), requires_grad=False)

    @torch.no_grad()
    def __call__(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """As `RWKV.forward`; logits and state in float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.products == "bfloat16"):
            logits, state = self.model(idx, state, full_output=full_output)
        return logits.float(), [x.float() for x in state]
