"""Reading a prompt with packed weights: the model in PyTorch, its matrix products in C++.

What it is not: a second model. It is an RWKV whose linear layers hold packed matrices: a prompt is read time-parallel,
with one pass over the weights for all its tokens, and no matrix is ever unpacked as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV

from .packing import Packed

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE = ("head", "att.output")  # what is read, or added to the residual stream, as it is


class PackedLinear(nn.Module):
    """x (..., columns) -> (..., rows) in `out`, x rounded to dtype first.

    product(packed, x (n, width), y (n, rows)) computes y; x is contiguous, y overwritten.
    """

    def __init__(
        self, packed: Packed, dtype: torch.dtype, out: torch.dtype, product: Callable[[Packed, Tensor, Tensor], None]
    ):
        super().__init__()
        self.packed, self.dtype, self.out, self.product = packed, dtype, out, product

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype).contiguous()
        if filling := self.packed.width - self.packed.columns:
            rows = F.pad(rows, (0, filling))
        y = torch.empty(len(rows), self.packed.rows, dtype=self.out)
        self.product(self.packed, rows, y)
        return y.view(*x.shape[:-1], -1)


class PromptReader:
    """Called like an RWKV, without gradients.

    Args:
        weights: name -> tensor of everything that is not packed, float32 but for the embedding.
        matrices: name (without ".weight") -> packed matrix.
        products: "float32" or "bfloat16", what matrices are multiplied in. With bfloat16 what goes into a product and
            what comes out is rounded to it, as in training with --precision bf16; sums, the residual stream, norms, the
            state and logits are float32.
        product: see PackedLinear.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        matrices: Mapping[str, Packed],
        products: str,
        product: Callable[[Packed, Tensor, Tensor], None],
    ):
        if products not in PRODUCTS:
            raise ValueError(f"products = {products!r}: choose from {', '.join(PRODUCTS)}")
        bare = {f"{name}.weight": torch.empty(p.rows, p.columns, device="meta") for name, p in matrices.items()}
        self.model = RWKV(config, {**bare, **weights}).eval().requires_grad_(False)
        self.model.emb.register_forward_hook(lambda module, inputs, out: out.float())
        for name, packed in matrices.items():
            out = torch.float32 if name.endswith(WIDE) else PRODUCTS[products]
            self.model.set_submodule(name, PackedLinear(packed, PRODUCTS[products], out, product))
        self.narrow = torch.autocast("cpu", PRODUCTS[products], enabled=products == "bfloat16", cache_enabled=False)

    @torch.no_grad()
    def __call__(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """As `RWKV.forward`; logits and state in float32."""
        with self.narrow:
            return self.model(idx, state, full_output=full_output)
