"""The training loss of the official trainer: mean cross entropy, with a small pull on the largest logit.

The value is plain cross entropy. The gradient has one more term, "L2Wrap": at each of the B T positions, the largest
logit m receives 1e-4 m / (B T), which keeps logits near zero. As in the official code this term is not multiplied by
the incoming gradient: scaling the loss (accumulation, float16 loss scaling) leaves it as it is.

Source: `L2Wrap` in RWKV-LM, RWKV-v5/src/model.py. Worked on in slices of rows, because logits are the largest
tensor of a model with a big vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

L2WRAP = 1e-4
_SLICE = 1 << 20  # numbers of one slice of logits


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
    """Mean cross entropy of logits (B, T, V) against targets (B, T), with L2Wrap in its gradient.

    Computed in float32 (float64 for float64 logits). Returns a scalar.

    Raises:
        ValueError: the shapes do not fit, or a target is not in 0 .. V-1.
    """
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or targets.numel() == 0:
        raise ValueError(
            f"l2wrap_cross_entropy: logits (B, T, V) and targets (B, T) with B T > 0 are needed, "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    V = logits.shape[-1]
    if logits.device.type == "cpu" and (int(targets.min()) < 0 or int(targets.max()) >= V):
        raise ValueError(
            f"l2wrap_cross_entropy: targets run from {int(targets.min())} to {int(targets.max())}, but the model has "
            f"only tokens 0 to {V - 1}: were the data made with another tokenizer?"
        )
    return _L2WrapCrossEntropy.apply(logits.reshape(-1, V), targets.reshape(-1).long())
