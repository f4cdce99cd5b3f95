"""The parts of a layer that are no matrix product, each as one pass over memory where that is quicker.

    mix           token shift and all its mixes          x (B, T, D) -> one (B, T, D) for each time_mix
    normed_gate   the end of time mixing                 norm(y) silu(g)
    relu2         the middle of channel mixing           max(x, 0)^2
    gate          the end of channel mixing              sigmoid(r) v
    softmax_      the loss                               see there

Each function has its definition in plain PyTorch beside it, `plain_mix` and so on: what it computes, in a few lines.
On a CPU in float32 or float64, with bfloat16 products or without, `elementwise.py` does the same, and its gradient by
hand: what a step of autograd would write and read again stays in registers. Everywhere else (a GPU, float16,
torch.compile, a single step of generation, no C++ compiler) the definition itself runs.

Symbols: B batch, T steps, D channels, N channels of a head. What it is not: a layer (`layers.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import elementwise

# ---- the definitions


def token_shift(x: Tensor, x_prev: Tensor) -> Tensor:
    """x (B, T, D) moved one step into the past; x_prev (B, D) comes before the first step."""
    before = x_prev.to(x.dtype).unsqueeze(1)  # (B, 1, D)
    return before if x.shape[1] == 1 else torch.cat((before, x[:, :-1]), dim=1)


def plain_mix(x: Tensor, x_prev: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    shifted = token_shift(x, x_prev)
    # mix of now, 1 - mix of one step earlier. FSDP has weights in bfloat16 where autocast leaves x in float32.
    return tuple(torch.lerp(shifted, x, mix.to(x.dtype)) for mix in mixes)


def plain_normed_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y = F.layer_norm(y if y.dtype == torch.float64 else y.float(), y.shape[-1:], eps=eps)
    return torch.addcmul(bias.to(y.dtype), y.flatten(2), weight.to(y.dtype)) * F.silu(g)


def plain_relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def plain_gate(r: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return (torch.sigmoid(r) * v).to(dtype or v.dtype)


def plain_softmax_(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.to(weights.dtype)
    largest, at = x.max(dim=-1)
    logsum = torch.logsumexp(x, dim=-1)
    losses = logsum - x.gather(1, targets[:, None])[:, 0]
    p = torch.exp(x - logsum[:, None])
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
    logits.copy_(p.mul_(weights[:, None]))
    return losses, largest, at


# ---- what the layers call


def mix(x: Tensor, x_prev: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    """x (B, T, D) blended with itself one step earlier, once for each of `mixes` (1, 1, D); x_prev (B, D) is before."""
    format = elementwise.kernel_format(x.dtype, elementwise.narrow_of(x), x, x_prev, *mixes)
    if format is None or len(mixes) not in (2, elementwise.MOST_MIXES) or any(m.dtype != x.dtype for m in mixes):
        return plain_mix(x, x_prev, *mixes)
    return _Mix.apply(format, x, x_prev, *mixes)


def normed_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y (B, T, H, N) to mean 0 and variance 1 in each head, times weight plus bias (D), times silu(g) (B, T, D)."""
    format = elementwise.kernel_format(weight.dtype, y.dtype, g, y, weight, bias)
    if format is None or g.dtype != y.dtype or bias.dtype != weight.dtype:
        return plain_normed_gate(y, g, weight, bias, eps)
    return _NormedGate.apply(format, y, g, weight, bias, eps)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    format = elementwise.kernel_format(torch.promote_types(x.dtype, torch.float32), x.dtype, x)
    return plain_relu2(x) if format is None else _Relu2.apply(format, x)


def gate(r: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sigmoid(r) v, as numbers of `dtype` (that of v if none is given)."""
    dtype = dtype or v.dtype
    format = elementwise.kernel_format(dtype, v.dtype, r, v)
    return plain_gate(r, v, dtype) if format is None or r.dtype != v.dtype else _Gate.apply(format, r, v)


def softmax_(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies (n,), the largest logits (n,) and where they are, of logits (n, V) that are lost: in their place
    stands the gradient of sum(weights losses) by each logit. weights (n,) are float32, or float64 if logits are."""
    format = elementwise.kernel_format(weights.dtype, logits.dtype, logits, targets, weights)
    if format is None or not logits.is_contiguous():
        return plain_softmax_(logits, targets, weights)
    return elementwise.softmax_(format, logits, targets.contiguous(), weights.contiguous())


# ---- one node of autograd each


def _own(x: Tensor) -> Tensor:
    """A copy, which may be overwritten."""
    return x.clone(memory_format=torch.contiguous_format)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, x, x_prev, *mixes):
        x, before = x.contiguous(), x_prev.to(x.dtype).contiguous()
        ctx.save_for_backward(x, before, *mixes)
        ctx.format, ctx.dtype = format, x_prev.dtype
        return elementwise.mix_forward(format, x, before, mixes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, before, *mixes = ctx.saved_tensors
        gx, gbefore, gmixes = elementwise.mix_backward(ctx.format, x, before, mixes, [g.contiguous() for g in grads])
        return None, gx, gbefore.to(ctx.dtype), *gmixes


class _NormedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, y, g, weight, bias, eps):
        y, g = y.contiguous(), g.contiguous()
        ctx.save_for_backward(y, g, weight, bias)
        ctx.format, ctx.eps = format, eps
        return elementwise.normed_gate_forward(format, y, g, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        return None, *elementwise.normed_gate_backward_(ctx.format, *ctx.saved_tensors, ctx.eps, _own(gout)), None


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, x):
        out = elementwise.relu2_forward_(format, _own(x))
        ctx.save_for_backward(out)
        ctx.format = format
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        return None, elementwise.relu2_backward_(ctx.format, *ctx.saved_tensors, _own(gout))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, r, v):
        r, v = r.contiguous(), v.contiguous()
        ctx.save_for_backward(r, v)
        ctx.format = format
        return elementwise.gate_forward(format, r, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        return None, *elementwise.gate_backward(ctx.format, *ctx.saved_tensors, gout.contiguous())
