"""What both ways through a chunk share (`middle.py`, `halving.py`): powers of the decay, and tensors cut in chunks.

What it is not: anything about the equation.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXPONENT = 20.0  # exp(20) = 5e8: factors up to this size lose nothing in float32


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64; Apple's GPUs cannot."""
    return device.type != "mps"


def in_float64(x: Tensor) -> Tensor:
    """x in float64, on the processor if x's own device cannot: meant for the few numbers of (H, N)."""
    return x.double() if has_float64(x.device) else x.cpu().double()


class Powers:
    """P(n) = d^n of some heads, for chunks of L steps; log_d (h, N) in float64, all powers in `dtype` where w lies."""

    def __init__(self, w: Tensor, chunk: int, dtype: torch.dtype):
        self.L, self.dtype, self.device = chunk, dtype, w.device
        self.log_d = -torch.exp(in_float64(w))
        self.whole = self.power(chunk)  # P(L): what a chunk leaves of a state
        self.steps = torch.arange(chunk, device=self.log_d.device)

    def power(self, n: int) -> Tensor:
        """P(n) as (h, N, 1): a factor for states."""
        return self._narrow(torch.exp(n * self.log_d)).unsqueeze(-1)

    def powers(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Exponents n (L,) -> n as (L, 1) and P(n) as (h, L, N), computed in float64."""
        n = n.to(self.log_d.dtype).unsqueeze(-1)
        return self._narrow(n), self._narrow(torch.exp(n * self.log_d.unsqueeze(1)))

    def _narrow(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(self.device)  # in this order: float64 may not exist there

    def load(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """(b, T, h, N), times (h, L, N) -> contiguous (C, b, h, L, N) in the working dtype: chunks come one after the
        other, so that all of them, or all but one at an end, are one batch of matrices."""
        b, T, h, N = x.shape
        view = x.reshape(b, T // self.L, self.L, h, N).permute(1, 0, 3, 2, 4)
        if factor is None:
            return view.to(self.dtype, memory_format=torch.contiguous_format).contiguous()
        return torch.mul(view, factor, out=factor.new_empty(view.shape))

    def store(self, into: Tensor, x: Tensor, factor: Tensor | None = None) -> None:
        """The way back: (C, b, h, L, N), times (h, L, N), into a slice (b, T, h, N) of the result."""
        into, x = into.unflatten(1, (-1, self.L)), x.permute(1, 0, 3, 2, 4)
        if factor is None:
            into.copy_(x)
        else:
            torch.mul(x, factor.transpose(0, 1), out=into)


def decay_share(exponents: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """What factors x = r P(n) with gradient g give to log d: the sum of n x g over all but (h, N).

    exponents (L, 1); x and g (C, b, h, L, N), or groups of pairs (C, b, h, groups, L, N).
    """
    return ((x * g).sum((0, 1, 3) if x.dim() == 6 else (0, 1)) * exponents).sum(1)


def product_(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, for batches of matrices (..., n, m), (..., m, p), (..., n, p)."""
    if out.is_contiguous():
        out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), beta=int(add))  # 0: out is not even read
    elif add:
        out.add_(a @ b)
    else:
        out.copy_(a @ b)
