"""One block of RWKV-5.2: time mixing and channel mixing, each added to the residual stream.

    x += att(ln1 x),   x += ffn(ln2 x)

Symbols: B batch, T steps, D n_embd, H heads of N channels. What it is not: the layers themselves (`layers.py`), the
rare options (`options.py`). Source: `Block` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import ChannelMix, TimeMix
from .options import MishGLU, add_tiny_attention, tiny_attention


class Block(nn.Module):
    """One layer. Its three states: att x_prev (B, D), wkv (B, H, N, N), ffn x_prev (B, D).

    Block 0 also holds ln0 and the position embedding, which `RWKV` applies; with pre_ffn its second state is empty.
    """

    def __init__(self, config: ModelConfig, layer_id: int):
        super().__init__()
        D, n = config.n_embd, config.my_pos_emb
        self.ln1 = nn.LayerNorm(D)
        self.ln2 = nn.LayerNorm(D)
        if layer_id == 0:
            self.ln0 = nn.LayerNorm(D)
            if n > 0:
                self.pos_emb_x = nn.Parameter(torch.empty(1, n, D))
                self.pos_emb_y = nn.Parameter(torch.empty(n, 1, D))
        self.has_att = layer_id > 0 or config.pre_ffn == 0
        if self.has_att:
            self.att = TimeMix(config)
        else:
            self.ffnPre = ChannelMix(config)
        self.ffn = MishGLU(config) if config.my_testing == "g" else ChannelMix(config)
        self.has_tiny_att = config.tiny_att_dim > 0 and config.tiny_att_layer == layer_id
        if self.has_tiny_att:
            add_tiny_attention(self, config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, state: list[Tensor], x_emb: Tensor | None = None, tiny_state: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, T, D) and the three states -> the same after the block.

        The block with the tiny attention also takes the tokens' embedding x_emb (B, T, D) and the attention's state,
        which it returns as a fourth one.
        """
        if self.has_att:
            out, first_x, wkv = self.att(self.ln1(x), state[0], state[1])
        else:
            out, first_x = self.ffnPre(self.ln1(x), state[0])
            wkv = state[1]
        x = F.dropout(x + out, self.dropout, self.training)  # official: on the whole residual, not on `out` alone
        out, ffn_x = self.ffn(self.ln2(x), state[2])
        x = F.dropout(x + out, self.dropout, self.training)
        after = [first_x, wkv, ffn_x]
        if self.has_tiny_att:
            out, tiny_state = tiny_attention(self, x, x_emb, tiny_state)
            x = x + out
            after.append(tiny_state)
        return x, after
