"""The training loss of the official trainer: mean cross entropy, with a small pull on the largest logit.

    l2wrap_cross_entropy(logits, targets)           of logits that are there
    head_loss(x, head.weight, targets, mask)        of what the head sees: the head itself is part of it
    next_token_loss(model, idx, targets, mask)      of a model and a batch, by the better of the two
    token_losses(model, idx, targets)               cross entropy alone, position by position, to measure a model

The value is plain cross entropy. The gradient has one more term, "L2Wrap": at each of the B T positions, the largest
logit m receives 1e-4 m / (B T), which keeps logits near zero. As in the official code this term is not multiplied by
the incoming gradient: scaling the loss (accumulation, float16 loss scaling) leaves it as it is. So with a batches
accumulated into a step, each with its loss divided by a, the pull is a times that of one batch of their size together;
under a loss scale s, which the optimizer divides out, it is s times weaker.

Logits are the largest tensor of a model with a big vocabulary: 0.5 GB for 8 x 256 positions and 65536 tokens in
float32, and several times that with their softmax and gradient. `head_loss` makes them a slice of positions at a time,
and the gradients of x and weight from each slice while it is there; backward only hands them out.

Symbols: n = B T positions, D n_embd, V vocabulary. What it is not: a measure of a model (`evaluate`).
Source: `L2Wrap` in RWKV-LM, RWKV-v5/src/model.py, and its masked loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import fused

L2WRAP = 1e-4
SLICED_VOCAB = 4096  # from here on slices are the quicker way too
_SLICE = 1 << 20  # numbers of one slice of logits that are there
_HEAD_SLICE = 1 << 25  # numbers of logits that head_loss makes at a time: each slice passes over the weight's gradient


class _L2WrapCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        rows = max(1, _SLICE // logits.shape[1])
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logsum = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for a in range(0, len(logits), rows):
            logsum[a : a + rows] = torch.logsumexp(logits[a : a + rows].to(dtype), dim=-1)
        ctx.save_for_backward(logits, targets, logsum)
        return (logsum - logits.gather(1, targets[:, None])[:, 0]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        logits, targets, logsum = ctx.saved_tensors
        n, rows = len(logits), max(1, _SLICE // logits.shape[1])
        grad = torch.empty_like(logits)
        for a in range(0, n, rows):
            part = slice(a, a + rows)
            x = logits[part].to(logsum.dtype)
            largest, at = x.max(dim=-1, keepdim=True)
            p = torch.exp(x - logsum[part, None])  # (rows, V): the softmax
            p.scatter_add_(1, targets[part, None], p.new_full((len(p), 1), -1.0))
            p *= g / n
            grad[part] = p.scatter_add_(1, at, largest * (L2WRAP / n))
        return grad, None


def l2wrap_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, T, V) against targets (B, T); its gradient includes L2Wrap.

    Returns a scalar in float32 (float64 if logits are), whatever the logits' dtype. Differentiable once.

    Raises:
        ValueError: the shapes do not fit, or a target is not in 0 .. V-1.
    """
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or targets.numel() == 0:
        raise ValueError(
            f"l2wrap_cross_entropy: logits (B, T, V) and targets (B, T) with B T > 0 are needed, "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    V = logits.shape[-1]
    _check_targets("l2wrap_cross_entropy", targets, V)
    return _L2WrapCrossEntropy.apply(logits.reshape(-1, V), targets.reshape(-1).long())


def _in_slices(
    x: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype, masked: bool,
    want_x: bool, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses (n,), the largest logits (n,) and where they are; gradients of sum(weights losses) by x and weight."""
    n, V = len(x), len(weight)
    rows = max(1, min(n, _HEAD_SLICE // V))
    # n weights: with few exponents in a number format, a probability does better than its n-th part
    relative, later, unit = n * weights, 1 / n, None
    if masked and dtype == torch.float16:  # it ends at 65504, and n weights of a single answer are n
        unit = weights.max().clamp(min=torch.finfo(weights.dtype).tiny)  # a tensor: to ask a GPU for it is to wait
        relative, later = weights / unit, 1.0
    narrow_x, narrow_weight = x.to(dtype), weight.to(dtype)
    losses, largest, at = torch.empty_like(weights), torch.empty_like(weights), torch.empty_like(targets)
    gx = torch.empty_like(x, dtype=weights.dtype) if want_x else None
    gweight = torch.empty_like(weight, dtype=weights.dtype) if want_weight else None
    buffer = torch.empty(rows, V, dtype=dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for a in range(0, n, rows):
            part, xs = slice(a, a + rows), narrow_x[a : a + rows]
            logits = torch.mm(xs, narrow_weight.T, out=buffer[: len(xs)])  # (rows, V)
            losses[part], largest[part], at[part] = fused.softmax_(logits, targets[part], relative[part])
            if want_x:
                gx[part] = logits @ narrow_weight
                gx[part].mul_(later)  # only now, in float32: float16 has no digits left for so small numbers
            if want_weight and dtype == gweight.dtype:
                torch.addmm(gweight, logits.T, xs, beta=float(a > 0), alpha=later, out=gweight)
            elif want_weight:
                product = logits.T @ xs  # (V, D)
                gweight.copy_(product).mul_(later) if a == 0 else gweight.add_(product, alpha=later)
    for gradient in (gx, gweight):
        if unit is not None and gradient is not None:
            gradient.mul_(unit)
    return losses, largest, at, gx, gweight


class _HeadLoss(torch.autograd.Function):
    """x (n, D), weight (V, D), targets (n,), weights (n,) of the positions -> sum(weights ce)."""

    @staticmethod
    def forward(ctx, x, weight, targets, weights, dtype, masked, differentiate):
        ctx.how = dtype, masked, *(differentiate and needed for needed in ctx.needs_input_grad[:2])
        losses, largest, at, *ctx.gradients = _in_slices(x, weight, targets, weights, *ctx.how)
        ctx.save_for_backward(x, weight, targets, weights, largest * (L2WRAP / len(x)), at)
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, targets, weights, pull, at = ctx.saved_tensors
        # handed out, not kept: autograd makes the gradient of a parameter of what nobody else holds, else of a copy
        (gx, gweight), ctx.gradients = ctx.gradients or _in_slices(x, weight, targets, weights, *ctx.how)[3:], None
        scaled = g.device.type != "cpu" or float(g) != 1.0
        if gx is not None:
            gx = gx.mul_(g) if scaled else gx
            gx = gx.addcmul_(pull[:, None], weight[at].to(gx.dtype)).to(x.dtype)
        if gweight is not None:
            gweight = gweight.mul_(g) if scaled else gweight
            gweight = gweight.index_add_(0, at, pull[:, None] * x.to(gweight.dtype)).to(weight.dtype)
        return gx, gweight, None, None, None, None, None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loss of logits x weight^T, which are never whole in memory; value and gradients as of the plain way.

    Args:
        x: (B, T, D), what the head sees.
        weight: (V, D), of the head.
        targets: (B, T) token ids.
        mask: (B, T) of 0 and 1, or None. With it the value is sum(ce mask) / sum(mask), 0 for a mask of zeros, while
            L2Wrap pulls at every position, as in the official code.

    Returns a scalar in float32 (float64 if x is). Products are of x's dtype, or of autocast's. Differentiable once; a
    second backward through the same graph does all the work again.

    Raises:
        ValueError: the shapes do not fit, or a target is not in 0 .. V-1.
    """
    if x.dim() != 3 or targets.shape != x.shape[:2] or targets.numel() == 0 or weight.shape[1:] != x.shape[2:]:
        raise ValueError(
            f"head_loss: x (B, T, D), weight (V, D) and targets (B, T) with B T > 0 are needed, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"head_loss: a mask (B, T) = {tuple(targets.shape)} is needed, got {tuple(mask.shape)}")
    _check_targets("head_loss", targets, len(weight))
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = torch.full((targets.numel(),), 1 / targets.numel(), dtype=wide, device=x.device)
    if mask is not None:
        mask = mask.reshape(-1).to(wide)  # DeepSpeed and FSDP make it half: ones could not be counted
        weights = mask / mask.sum().clamp(min=1e-9)
    autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    differentiate = torch.is_grad_enabled()  # inside it is always off
    flat = x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1).long(), weights
    return _HeadLoss.apply(*flat, dtype, mask is not None, differentiate)


class _L2Wrap(torch.autograd.Function):
    """The loss as it is; in the gradient 1e-4 / (B T) of the largest logit at each position, whatever comes in."""

    @staticmethod
    def forward(ctx, loss, logits):
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (logits,) = ctx.saved_tensors
        largest, at = logits.max(dim=-1, keepdim=True)
        pull = torch.zeros_like(logits)
        pull.scatter_(-1, at, largest * (L2WRAP / largest.numel()))
        return g, pull


def masked_cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """sum(ce * mask) / sum(mask) over logits (B, T, V), targets and mask (B, T); L2Wrap pulls at every position.

    As in the official trainer, the mean is that of one process: where batches have masks of different sizes, an answer
    weighs more in a batch that has few others. A mask of zeros gives 0, and no gradient but L2Wrap's.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.to(wide).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    mask = mask.to(wide)  # DeepSpeed and FSDP make it half: ones could not be counted
    return _L2Wrap.apply((losses * mask).sum() / mask.sum().clamp(min=1e-9), logits)


def next_token_loss(
    model: nn.Module, idx: Tensor, targets: Tensor, mask: Tensor | None = None, sliced: bool = True
) -> Tensor:
    """The loss of an RWKV that reads idx (B, T) and should say targets (B, T); mask (B, T) as for `head_loss`.

    sliced: False always makes the logits whole. Needed where the head's weight is only there while the head runs
    (parameters cut among processes), and what happens anyway with a small vocabulary, head_qk, or torch.compile.
    """
    c = model.config
    if sliced and c.vocab_size >= SLICED_VOCAB and c.head_qk == 0 and not torch.compiler.is_compiling():
        return head_loss(model.hidden(idx)[0], model.head.weight, targets, mask)
    logits, _ = model(idx)
    return l2wrap_cross_entropy(logits, targets) if mask is None else masked_cross_entropy(logits, targets, mask)


def token_losses(model: nn.Module, idx: Tensor, targets: Tensor, sliced: bool = True) -> Tensor:
    """Cross entropy of each position (B, T), in float32 or better, without gradients in mind.

    The head works on a slice of positions at a time, so that this needs less memory than a training step; sliced as
    for `next_token_loss`.
    """
    V, head = model.config.vocab_size, model.head
    if sliced and model.config.head_qk == 0:
        x = model.hidden(idx)[0].flatten(0, 1)  # (B T, D)
    else:
        x, head = model(idx)[0].flatten(0, 1), nn.Identity()  # (B T, V)
    rows = max(1, _HEAD_SLICE // V)
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = zip(x.split(rows), targets.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(head(some).to(wide), right, reduction="none") for some, right in parts]
    return torch.cat(losses).view(targets.shape)


def _check_targets(name: str, targets: Tensor, V: int) -> None:
    if targets.device.type == "cpu" and (int(targets.min()) < 0 or int(targets.max()) >= V):
        raise ValueError(
            f"{name}: targets run from {int(targets.min())} to {int(targets.max())}, but the model has "
            f"only tokens 0 to {V - 1}: were the data made with another tokenizer?"
        )
