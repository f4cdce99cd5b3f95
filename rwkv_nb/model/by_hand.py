"""Both layers with their gradients written out: in training on a processor, one node of autograd for each layer.

    time_mix                TimeMix.forward, from x to the output and the WKV state
    channel_mix             ChannelMix.forward, from x to the output
    suits, number_format    whether a layer can go this way, and in which format of numbers

`layers.py` says what a layer computes, and autograd derives it there from eight nodes, or six. Here the same functions
run in the same order, and the chain rule is applied by hand, from the output back to x. What is saved is the time
between two kernels, in which Python calls the next one while one thread works and the others wait; and memory, as a
gradient that nobody else sees is overwritten by the next. `benchmarks/RESULTS.md` has how much that is.

Symbols: B batch, T steps, D n_embd, A dim_att, H heads of N channels, F dim_ffn; a name with g in front is the gradient
of the loss by what the rest names. What it is not: other arithmetic, or another state dict. A layer whose parts are
listened to (hooks) or were exchanged goes by its parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_nb.wkv import best_backend, operator

from . import elementwise, products
from .products import Linear, gradient_by_weight, gradient_by_x, multiply


def time_mix(layer: nn.Module, x: Tensor, x_prev: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
    """x (B, T, D), x_prev (B, D), state (B, H, N, N) -> out (B, T, D), the state after the last step.

    None: the layer must go by its parts.
    """
    if not suits(layer, x):
        return None
    tensors = (
        layer.time_mix_k, layer.time_mix_v, layer.time_mix_r, layer.time_mix_g,
        layer.key.weight, layer.value.weight, layer.receptance.weight, layer.gate.weight, layer.output.weight,
        layer.time_decay, layer.time_faaaa, layer.ln_x.weight, layer.ln_x.bias,
    )  # fmt: skip
    format = number_format(x, x_prev, tensors)
    return None if format is None else _TimeMix.apply(format, layer.eps, x, x_prev, state, *tensors)


def channel_mix(layer: nn.Module, x: Tensor, x_prev: Tensor) -> Tensor | None:
    """x (B, T, D), x_prev (B, D) -> out (B, T, D); None: the layer must go by its parts."""
    if not suits(layer, x):
        return None
    weights = layer.key.weight, layer.receptance.weight, layer.value.weight
    tensors = layer.time_mix_k, layer.time_mix_r, *weights
    format = number_format(x, x_prev, tensors)
    return None if format is None else _ChannelMix.apply(format, x, x_prev, *tensors)


def suits(layer: nn.Module, x: Tensor) -> bool:
    """Whether this is training, and nobody would notice that the layer's parts are not called."""
    if not torch.is_grad_enabled() or x.dim() != 3 or nn.modules.module._has_any_global_hook():
        return False
    return all(_untouched(part) for part in layer.children())


def number_format(x: Tensor, x_prev: Tensor, tensors: Sequence[Tensor]) -> int | None:
    """The kernel's number for the formats of x and of its products; None: it cannot do it with these weights."""
    if any(t.dtype != x.dtype for t in tensors):
        return None
    return elementwise.kernel_format(x.dtype, elementwise.narrow_of(x), x, x_prev, *tensors)


def _untouched(part: nn.Module) -> bool:
    """Whether to call this part would do no more than its arithmetic."""
    return type(part) in (Linear, nn.GroupNorm) and "forward" not in vars(part) and not (
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    )  # fmt: skip


class _TimeMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, eps, x, x_prev, state, mk, mv, mr, mg, Wk, Wv, Wr, Wg, Wo, w, u, weight, bias):
        by_onednn, narrow = products.suits(x, Wk), elementwise.narrow_dtype(format, x)
        x, before = x.contiguous(), x_prev.to(x.dtype).contiguous()
        Wk, Wv, Wr, Wg, Wo = (W.to(narrow) for W in (Wk, Wv, Wr, Wg, Wo))
        xk, xv, xr, xg = elementwise.mix_forward(format, x, before, (mk, mv, mr, mg))
        heads = *x.shape[:2], *w.shape  # (B, T, H, N)
        r = multiply(xr, Wr, by_onednn).view(heads)
        k = multiply(xk, Wk, by_onednn).view(heads)
        v = multiply(xv, Wv, by_onednn).view(heads)
        g = multiply(xg, Wg, by_onednn)  # (B, T, A)
        wide = state.to(w.dtype).contiguous()
        ctx.backend = best_backend(r)
        y, last, kept = operator.run_forward(r, k, v, w, u, wide, ctx.backend, True)
        z = elementwise.normed_gate_forward(format, y, g, weight, bias, eps)  # (B, T, A)
        ctx.save_for_backward(
            x, before, wide, mk, mv, mr, mg, Wk, Wv, Wr, Wg, Wo, w, u, weight, bias, xk, xv, xr, xg, r, k, v, g, y, z,
            kept,
        )  # fmt: skip
        ctx.format, ctx.by_onednn, ctx.eps = format, by_onednn, eps
        ctx.set_materialize_grads(False)
        return multiply(z, Wo, by_onednn), last

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, glast):
        (
            x, before, state, mk, mv, mr, mg, Wk, Wv, Wr, Wg, Wo, w, u, weight, bias, xk, xv, xr, xg, r, k, v, g, y, z,
            kept,
        ) = ctx.saved_tensors  # fmt: skip
        gout = torch.zeros_like(x, dtype=z.dtype) if gout is None else gout.contiguous()
        wanted = ctx.needs_input_grad[9:14]
        gz, gWo = _gradients(ctx, gout, Wo, z, wanted[4])
        gy, gg, gweight, gbias = elementwise.normed_gate_backward_(ctx.format, y, g, weight, bias, ctx.eps, gz)
        gr, gk, gv, gw, gu, gstate = operator.run_backward(r, k, v, w, u, state, kept, gy, glast, ctx.backend)
        gxk, gWk = _gradients(ctx, gk.view_as(g), Wk, xk, wanted[0])  # (B, T, D), (A, D)
        gxv, gWv = _gradients(ctx, gv.view_as(g), Wv, xv, wanted[1])
        gxr, gWr = _gradients(ctx, gr.view_as(g), Wr, xr, wanted[2])
        gxg, gWg = _gradients(ctx, gg, Wg, xg, wanted[3])
        gx, gbefore, gmixes = elementwise.mix_backward(ctx.format, x, before, (mk, mv, mr, mg), (gxk, gxv, gxr, gxg))
        return None, None, gx, gbefore, gstate, *gmixes, gWk, gWv, gWr, gWg, gWo, gw, gu, gweight, gbias


class _ChannelMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, format, x, x_prev, mk, mr, Wk, Wr, Wv):
        by_onednn, narrow = products.suits(x, Wk), elementwise.narrow_dtype(format, x)
        x, before = x.contiguous(), x_prev.to(x.dtype).contiguous()
        Wk, Wr, Wv = (W.to(narrow) for W in (Wk, Wr, Wv))
        xk, xr = elementwise.mix_forward(format, x, before, (mk, mr))
        k = elementwise.relu2_forward_(format, multiply(xk, Wk, by_onednn))  # (B, T, F)
        r, v = multiply(xr, Wr, by_onednn), multiply(k, Wv, by_onednn)  # (B, T, D)
        ctx.save_for_backward(x, before, mk, mr, Wk, Wr, Wv, xk, xr, k, r, v)
        ctx.format, ctx.by_onednn = format, by_onednn
        return elementwise.gate_forward(format, r, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout):
        x, before, mk, mr, Wk, Wr, Wv, xk, xr, k, r, v = ctx.saved_tensors
        gr, gv = elementwise.gate_backward(ctx.format, r, v, gout.contiguous())
        want_k, want_r, want_v = ctx.needs_input_grad[5:]
        gk, gWv = _gradients(ctx, gv, Wv, k, want_v)
        gk = elementwise.relu2_backward_(ctx.format, k, gk)  # (B, T, F)
        gxk, gWk = _gradients(ctx, gk, Wk, xk, want_k)
        gxr, gWr = _gradients(ctx, gr, Wr, xr, want_r)
        gx, gbefore, gmixes = elementwise.mix_backward(ctx.format, x, before, (mk, mr), (gxk, gxr))
        return None, gx, gbefore, *gmixes, gWk, gWr, gWv


def _gradients(ctx, g: Tensor, weight: Tensor, x: Tensor, want: bool) -> tuple[Tensor, Tensor | None]:
    """Of a product, by x and, if wanted, by the weight; one after the other, while g is in the caches."""
    gweight = gradient_by_weight(g, x) if want else None  # autograd turns it into the parameter's format
    return gradient_by_x(g, weight, ctx.by_onednn), gweight
