"""Inputs for a kernel and the truth about them, shared by the tests that run the CUDA sources on the processor."""

import torch

from rwkv_nb.wkv import wkv5_reference

NAMES = ("y", "last", "gr", "gk", "gv", "gw", "gu", "gstate")


def inputs(B, T, H, N, w=(-10.0, 4.0), dtype=torch.float32, seed=0):
    """r, k, v, w, u, state, gy, glast."""
    g = torch.Generator().manual_seed(seed)
    r, k, v, gy = (torch.randn(B, T, H, N, generator=g).to(dtype) for _ in range(4))
    u = torch.randn(H, N, generator=g)
    state, glast = (torch.randn(B, H, N, N, generator=g) for _ in range(2))
    return [r, k, v, torch.empty(H, N).uniform_(*w, generator=g), u, state, gy, glast]


def truth(r, k, v, w, u, state, gy, glast):
    """Name -> the loop in float64, gradients by autograd."""
    tensors = [x.double().requires_grad_() for x in (r, k, v, w, u, state)]
    y, last = wkv5_reference(*tensors)
    directions = [gy.double(), glast.double()]
    grads = torch.autograd.grad([y, last], tensors, directions, allow_unused=True, materialize_grads=True)
    return dict(zip(NAMES, (y.detach(), last.detach(), *grads), strict=True))
