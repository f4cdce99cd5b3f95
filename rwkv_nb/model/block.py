"""One block of RWKV-5.2: time mixing and channel mixing, each added to the residual stream.

    x += att(ln1 x),   x += ffn(ln2 x)

Symbols: B batch, T steps, D n_embd, H heads of N channels. What it is not: the layers themselves (`layers.py`).
Source: `Block` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import ChannelMix, TimeMix


class Block(nn.Module):
    """One layer. Its three states: att x_prev (B, D), wkv (B, H, N, N), ffn x_prev (B, D)."""

    def __init__(self, config: ModelConfig, layer_id: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        if layer_id == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, att_x, wkv = self.att(self.ln1(x), state[0], state[1])
        x = F.dropout(x + out, self.dropout, self.training)  # official: on the whole residual, not on `out` alone
        out, ffn_x = self.ffn(self.ln2(x), state[2])
        x = F.dropout(x + out, self.dropout, self.training)
        return x, [att_x, wkv, ffn_x]
