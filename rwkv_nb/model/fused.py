"""The parts of a layer that are no matrix product, each as one pass over memory where that is quicker.

    mix           token shift and all its mixes          x (B, T, D) -> one (B, T, D) for each time_mix
    normed_gate   the end of time mixing                 norm(y) silu(g)
    relu2_        the middle of channel mixing           max(x, 0)^2, in the place of x
    gate          the end of channel mixing              sigmoid(r) v
    softmax_      the loss                               see there

Each function has its definition in plain PyTorch beside it, `plain_mix` and so on: what it computes, in a few lines.
On a CPU in float32 or float64, with bfloat16 products or without, `kernels/elementwise_cpu.cpp` does the same, and its
gradient by hand: what a step of autograd would write and read again stays in registers. Everywhere else (a GPU,
float16, torch.compile, a single step of generation, no C++ compiler) the definition itself runs.

Symbols: B batch, T steps, D channels, N channels of a head. What it is not: a layer (`layers.py`).
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_nb.wkv import build, cpu

SOURCE = "elementwise_cpu.cpp"
PIECES = 32  # parts that the rows are cut into: the same for any number of threads, so that sums are too
MOST_MIXES = 4


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


def plain_relu2_(x: Tensor) -> Tensor:
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
    format = _format(x.dtype, _narrow(x), x, x_prev, *mixes)
    if format is None or len(mixes) not in (2, MOST_MIXES) or any(m.dtype != x.dtype for m in mixes):
        return plain_mix(x, x_prev, *mixes)
    return _Mix.apply(format, x, x_prev, *mixes)


def normed_gate(y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y (B, T, H, N) to mean 0 and variance 1 in each head, times weight plus bias (D), times silu(g) (B, T, D)."""
    format = _format(weight.dtype, y.dtype, g, y, weight, bias)
    if format is None or g.dtype != y.dtype or bias.dtype != weight.dtype:
        return plain_normed_gate(y, g, weight, bias, eps)
    return _NormedGate.apply(format, y, g, weight, bias, eps)


def relu2_(x: Tensor) -> Tensor:
    """max(x, 0)^2 of what nobody else needs: x, the result of a product, may be lost."""
    format = _format(torch.promote_types(x.dtype, torch.float32), x.dtype, x)
    return plain_relu2_(x) if format is None or not x.is_contiguous() else _Relu2.apply(format, x)


def gate(r: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """sigmoid(r) v, as numbers of `dtype` (that of v if none is given)."""
    dtype = dtype or v.dtype
    format = _format(dtype, v.dtype, r, v)
    return plain_gate(r, v, dtype) if format is None or r.dtype != v.dtype else _Gate.apply(format, r, v)


def softmax_(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropies (n,), the largest logits (n,) and where they are, of logits (n, V) that are lost: in their place
    stands the gradient of sum(weights losses) by each logit. weights (n,) are float32, or float64 if logits are."""
    format = _format(weights.dtype, logits.dtype, logits, targets, weights)
    if format is None or not logits.is_contiguous():
        return plain_softmax_(logits, targets, weights)
    losses, largest, at = torch.empty_like(weights), torch.empty_like(weights), torch.empty_like(targets)
    pointers = (x.data_ptr() for x in (logits, targets.contiguous(), weights.contiguous(), losses, largest, at))
    _run("softmax", format, logits[None], _SoftmaxArguments(*pointers))
    return losses, largest, at


# ---- the kernel


class _Shape(ctypes.Structure):
    """`struct Shape` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "D", "N", "M", "format", "threads", "pieces")),
        ("parallel", ctypes.c_void_p),
    ]


def _struct(*fields: str | tuple[str, type]) -> type[ctypes.Structure]:
    """A structure of pointers, in the order of the source's."""
    members = [(f, ctypes.c_void_p) if isinstance(f, str) else f for f in fields]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


_POINTERS = ctypes.c_void_p * MOST_MIXES
_MixArguments = _struct("x", "before", ("mix", _POINTERS), ("out", _POINTERS), "gx", "gbefore", "gmix")
_NormedGateArguments = _struct(
    "y", "g", "weight", "bias", ("eps", ctypes.c_double), "gout", "out", "gy", "gg", "gparameters"
)
_PointwiseArguments = _struct("a", "b", "gout", "out", "ga", "gb")
_SoftmaxArguments = _struct("logits", "targets", "weights", "losses", "largest", "at")

_FORMATS = {  # of the residual stream and parameters, of matrix products -> number in the source
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 1,
    (torch.float32, torch.bfloat16): 2,
}


def _narrow(x: Tensor) -> torch.dtype:
    """What a matrix product of x will be given: x's own dtype, or that of autocast."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _format(wide: torch.dtype, narrow: torch.dtype, x: Tensor, *others: Tensor) -> int | None:
    """The kernel's number for these dtypes; None: it cannot be used for these tensors, or is not worth it."""
    format = _FORMATS.get((wide, narrow))
    if format is None or torch.compiler.is_compiling() or x.dim() == 3 and x.shape[1] == 1:
        return None
    for tensor in (x, *others):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":  # a subclass has no memory
            return None
    return format if _library() else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler (`wkv5` says so)."""
    try:
        return build.load("elementwise_cpu", [SOURCE], build.cxx_flags())
    except build.BuildError:
        return None


def _pieces(x: Tensor) -> int:
    """Pieces that each row is cut into."""
    return max(1, min(x.shape[1], PIECES // max(1, x.shape[0])))


def _run(name: str, format: int, x: Tensor, arguments: ctypes.Structure, N: int = 0, M: int = 0) -> None:
    B, T, D = x.shape[0], x.shape[1], x[0, 0].numel() if x.numel() else 0
    if D:
        shape = _Shape(B, T, D, N, M, format, torch.get_num_threads(), _pieces(x), cpu.openmp()[0])
        getattr(_library(), f"elementwise_{name}")(ctypes.byref(shape), ctypes.byref(arguments))


def _addresses(tensors) -> ctypes.Array:
    return _POINTERS(*(x.data_ptr() for x in tensors))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, x, x_prev, *mixes):
        x, before = x.contiguous(), x_prev.to(x.dtype).contiguous()
        narrow = torch.bfloat16 if format == 2 else x.dtype
        outs = tuple(torch.empty_like(x, dtype=narrow) for _ in mixes)
        arguments = _MixArguments(x.data_ptr(), before.data_ptr(), _addresses(mixes), _addresses(outs))
        _run("mix_forward", format, x, arguments, M=len(mixes))
        ctx.save_for_backward(x, before, *mixes)
        ctx.format, ctx.dtype = format, x_prev.dtype
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, before, *mixes = ctx.saved_tensors
        grads = [g.contiguous() for g in grads]
        gx, gbefore, M = torch.empty_like(x), torch.empty_like(before), len(mixes)
        gmix = x.new_empty(x.shape[0] * _pieces(x), M, x.shape[2])
        arguments = _MixArguments(
            x.data_ptr(), before.data_ptr(), _addresses(mixes), _addresses(grads),
            gx.data_ptr(), gbefore.data_ptr(), gmix.data_ptr(),
        )  # fmt: skip
        _run("mix_backward", ctx.format, x, arguments, M=M)
        return None, gx, gbefore.to(ctx.dtype), *(g.view_as(mixes[0]) for g in gmix.sum(0))


class _NormedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, y, g, weight, bias, eps):
        y, g = y.contiguous(), g.contiguous()
        out = torch.empty_like(g)
        pointers = (y.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps)
        _run("normed_gate_forward", format, g, _NormedGateArguments(*pointers, None, out.data_ptr()), N=y.shape[-1])
        ctx.save_for_backward(y, g, weight, bias)
        ctx.format, ctx.eps = format, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        y, g, weight, bias = ctx.saved_tensors
        gout, gy, gg = gout.contiguous(), torch.empty_like(y), torch.empty_like(g)
        gparameters = weight.new_empty(g.shape[0] * _pieces(g), 2, g.shape[2])
        arguments = _NormedGateArguments(
            y.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), ctx.eps,
            gout.data_ptr(), None, gy.data_ptr(), gg.data_ptr(), gparameters.data_ptr(),
        )  # fmt: skip
        _run("normed_gate_backward", ctx.format, g, arguments, N=y.shape[-1])
        return None, gy, gg, *gparameters.sum(0), None


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, x):
        _run("relu2_forward", format, x, _PointwiseArguments(None, None, None, x.data_ptr()))
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.format = format
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        (out,) = ctx.saved_tensors
        gout, gx = gout.contiguous(), torch.empty_like(out)
        arguments = _PointwiseArguments(out.data_ptr(), None, gout.data_ptr(), None, gx.data_ptr())
        _run("relu2_backward", ctx.format, out, arguments)
        return None, gx


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, r, v):
        r, v = r.contiguous(), v.contiguous()
        out = torch.empty_like(r, dtype=torch.float32 if format == 2 else r.dtype)
        _run("gate_forward", format, r, _PointwiseArguments(r.data_ptr(), v.data_ptr(), None, out.data_ptr()))
        ctx.save_for_backward(r, v)
        ctx.format = format
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        r, v = ctx.saved_tensors
        gout, gr, gv = gout.contiguous(), torch.empty_like(r), torch.empty_like(v)
        arguments = _PointwiseArguments(
            r.data_ptr(), v.data_ptr(), gout.data_ptr(), None, gr.data_ptr(), gv.data_ptr()
        )
        _run("gate_backward", ctx.format, r, arguments)
        return None, gr, gv
