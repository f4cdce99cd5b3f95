"""The two layers of RWKV-5.2: time mixing (what remembers) and channel mixing (what computes).

Each takes its input x (B, T, D) and what came before it (the state), and returns its output and the state after the
last step. One code path for both uses: T = ctx_len in training, T = 1 in generation. Parameter names and shapes are
those of the official checkpoints.

Symbols: B batch, T steps, D n_embd, A dim_att, H heads of N channels, F dim_ffn. What it is not: how the layers are
stacked (`block.py`, `rwkv.py`), or the rare options (`options.py`).

Source: arXiv 2404.05892 section 4; `RWKV_Tmix_x052`, `RWKV_CMix_x052` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv_nb.wkv import wkv5

from . import by_hand, fused
from .config import ModelConfig
from .products import Linear


def _mix_parameter(config: ModelConfig) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, config.n_embd))


class TimeMix(nn.Module):
    """The part that remembers: r, k, v through the WKV-5 operator, normalised by head, gated."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, A, heads = config.n_embd, config.dim_att, (config.n_head, config.head_size_a)
        self.heads = heads
        # GroupNorm of y / divisor with eps 1e-5 is GroupNorm of y with eps 1e-5 divisor^2.
        self.eps = 1e-5 * config.head_size_divisor**2
        self.time_mix_k, self.time_mix_v = _mix_parameter(config), _mix_parameter(config)
        self.time_mix_r, self.time_mix_g = _mix_parameter(config), _mix_parameter(config)
        self.time_decay = nn.Parameter(torch.empty(heads))
        self.time_faaaa = nn.Parameter(torch.empty(heads))
        self.receptance = Linear(D, A)
        self.key = Linear(D, A)
        self.value = Linear(D, A)
        self.output = Linear(A, D)
        self.gate = Linear(D, A)
        self.ln_x = nn.GroupNorm(heads[0], A)

    def forward(self, x: Tensor, x_prev: Tensor, wkv_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), x_prev (B, D), wkv_state (B, H, N, N) -> out (B, T, D) and the two states after it."""
        if made := by_hand.time_mix(self, x, x_prev, wkv_state):  # the same, as one node of autograd
            return made[0], x[:, -1].clone(), made[1]
        B, T, _ = x.shape
        mixes = self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g
        xk, xv, xr, xg = fused.mix(x, x_prev, *mixes)  # four times (B, T, D)
        r = self.receptance(xr).view(B, T, *self.heads)
        k = self.key(xk).view(B, T, *self.heads)
        v = self.value(xv).view(B, T, *self.heads)
        y, wkv_state = wkv5(r, k, v, self.time_decay, self.time_faaaa, wkv_state)  # (B, T, H, N)
        y = fused.normed_gate(y, self.gate(xg), self.ln_x.weight, self.ln_x.bias, self.eps)  # (B, T, A)
        return self.output(y.to(xr.dtype)), x[:, -1].clone(), wkv_state


class ChannelMix(nn.Module):
    """The part that computes: a two-layer network with squared ReLU, gated by the receptance."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.time_mix_k, self.time_mix_r = _mix_parameter(config), _mix_parameter(config)
        self.key = Linear(config.n_embd, config.dim_ffn)
        self.receptance = Linear(config.n_embd, config.n_embd)
        self.value = Linear(config.dim_ffn, config.n_embd)

    def forward(self, x: Tensor, x_prev: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), x_prev (B, D) -> out (B, T, D) and the state after it."""
        if (out := by_hand.channel_mix(self, x, x_prev)) is not None:  # the same, as one node of autograd
            return out, x[:, -1].clone()
        xk, xr = fused.mix(x, x_prev, self.time_mix_k, self.time_mix_r)  # twice (B, T, D)
        k = fused.relu2(self.key(xk))  # (B, T, F)
        return fused.gate(self.receptance(xr), self.value(k), x.dtype), x[:, -1].clone()
