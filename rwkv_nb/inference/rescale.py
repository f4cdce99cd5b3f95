"""float16 without overflow: the residual stream is halved after every sixth block.

float16 ends at 65504, and the stream x of a large model grows from block to block beyond that. Blocks only look at
norms of x, which do not change when x is halved. So from block 6 on x counts halves, from 12 on quarters, and so on,
and what a block adds to it is divided by the same power of two: exact, but for the 1e-5 in each norm.

What it is not: needed in bfloat16 or float32, which reach 3e38. Source: RESCALE_LAYER in `rwkv/model.py`, 0.8.
"""

from __future__ import annotations

import torch

from rwkv_nb.model.rwkv import RWKV

EVERY = 6
_WRITERS = ("att.output", "ffn.value", "tiny_v")  # what a block adds to x comes out of these


@torch.no_grad()
def rescale(model: RWKV, every: int = EVERY) -> RWKV:
    """Change a model in place, for reading only; returns it."""
    for i, block in enumerate(model.blocks):
        modules = dict(block.named_modules())
        for name in _WRITERS:
            if name in modules:
                modules[name].weight.div_(2 ** (i // every))
        if (i + 1) % every == 0:
            block.register_forward_hook(lambda module, inputs, out: (out[0] / 2, out[1]))
    return model
