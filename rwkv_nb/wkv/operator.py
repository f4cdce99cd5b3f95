"""WKV-5 as an operator that PyTorch knows: autograd, torch.compile and export see one node, not a loop over time.

`apply` runs a chosen way of computing, its backend: a module with

    DEVICE: the type of the device whose tensors it takes (those of PLAIN take any, and need none)
    why_not(device=None) -> None if it can run on this device (None: on one of this machine's), else what is missing
        and the remedy
    prepare(N, dtype, device) -> nothing; compiles what such calls need and makes sure that it runs there, or raises
        BuildError (asked of a backend that "auto" may take)
    supports(N) -> None if it can do heads of size N, else why not
    saved_shape(B, T, H, N) -> shape of the tensor that forward fills for backward; (0,) if nothing is kept
    forward(r, k, v, w, u, state, saved) -> (y, last)
    backward(r, k, v, w, u, state, saved, gy, glast) -> gradients of r, k, v, w, u, state

state and glast, the gradient of last, may be None, which stands for zeros and costs nothing.

w is at most LARGEST_W: what comes out is the same, and in derivatives exp(w) is never infinity, which times 0 is NaN.

What it is not: the place where a backend is chosen or input is checked (`__init__.py`), except for what only values
tell: a decay that is no number.

Source: PyTorch's guide to custom operators in Python (`torch.library`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from . import chunked, cpu, cuda, emulated, reference
from .precision import exact_products
from .reference import LARGEST_W

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "cuda": cuda,
    "emulated": emulated,
}
PLAIN = ("reference", "chunked")  # plain PyTorch: any device, any head size, float64 too


def apply(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """y and the last state. Contiguous tensors that fit each other; w, u and state float32 (float64 if r is)."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (r, k, v, w, u, state))
    y, last, _ = _forward(r, k, v, w, u, state, backend, keep)
    return y, last


def check_numbers(w: Tensor) -> None:
    """Raise ValueError if w holds NaN. On a GPU nobody looks: the program would have to wait for the answer."""
    if w.device.type == "cpu" and not torch.compiler.is_compiling() and bool(torch.isnan(w).any()):
        raise ValueError(f"wkv5: w, of shape {tuple(w.shape)}, holds NaN; expected the raw time_decay, finite numbers")


def run_forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, backend: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and what `run_backward` needs (if keep): what the operator does, without autograd."""
    check_numbers(w)
    saved = w.new_empty(_saved_shape(r, backend) if keep else (0,))
    with torch.autocast(r.device.type, enabled=False), _exact(backend):  # else factors of products would be rounded
        y, last = BACKENDS[backend].forward(r, k, v, w.clamp(max=LARGEST_W), u, state, saved if keep else None)
    return y, state.clone() if last is state else last, saved


_forward = torch.library.custom_op("rwkv_nb::wkv5", run_forward, mutates_args=())


@_forward.register_fake
def _(r, k, v, w, u, state, backend, keep):
    B, _, H, N = r.shape
    return torch.empty_like(r), w.new_empty(B, H, N, N), w.new_empty(_saved_shape(r, backend) if keep else (0,))


def run_backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, saved: Tensor, gy: Tensor,
    glast: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of r, k, v, w, u and state; glast, that of the last state, may be None."""
    with torch.autocast(r.device.type, enabled=False), _exact(backend):  # wherever backward is called from
        glast = None if glast is None else glast.contiguous()
        w = w.clamp(max=LARGEST_W)
        grads = BACKENDS[backend].backward(r, k, v, w, u, state, saved, gy.contiguous(), glast)
    return tuple(g.clone() if g is glast else g for g in grads)


_backward = torch.library.custom_op("rwkv_nb::wkv5_backward", run_backward, mutates_args=())


@_backward.register_fake
def _(r, k, v, w, u, state, saved, gy, glast, backend):
    B, _, H, N = r.shape
    return *(torch.empty_like(x) for x in (r, k, v, w, u)), w.new_empty(B, H, N, N)


def _exact(backend: str) -> AbstractContextManager:
    return exact_products() if backend in PLAIN else nullcontext()  # the others multiply without PyTorch


def _saved_shape(r: Tensor, backend: str) -> tuple[int, ...]:
    return BACKENDS[backend].saved_shape(*r.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend, ctx.keep = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _derive(ctx, gy, glast, _):
    r, *others, state, saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
    gy = torch.zeros_like(r) if gy is None else gy
    *grads, gstate = _backward(r, *others, state, saved, gy, glast, ctx.backend)
    return *grads, None if state is None else gstate, None, None


_forward.register_autograd(_derive, setup_context=_setup_context)
