"""The four rare options of the official trainer, and its other feed-forward network: what each computes.

    my_testing "g"   MishGLU in place of channel mixing: W_v (W_a x_a * mish(W_b x_b))
    my_pos_emb n     a learned embedding of the position, seen as a point (row, column) of an n x n square
    tiny_att_dim d   in block tiny_att_layer an attention without softmax: x += (q k^T / sqrt d, causal) v
    head_qk n        logits += (q k^T / n, causal) onehot(tokens): a vote for the tokens that were read before

(The fifth, pre_ffn, needs nothing new: block 0 has a channel mixing, `ffnPre`, in place of its time mixing.) None of
them is in a published model; the `rwkv` package knows none.

What they remember goes into the state, so that they too run token by token. Without a softmax attention is a sum, and
what tiny attention has read is one matrix, the sum of k^T v. head_qk keeps every token and its key: its state grows.
The position embedding counts.

Symbols: B batch, T steps, S steps read so far, D n_embd, V vocabulary. What it is not: the layers that every model has
(`layers.py`). Source: `MishGLU`, `Block`, `RWKV` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .fused import token_shift


class MishGLU(nn.Module):
    """A gated two-layer network: the gate is mish(b) = b tanh(log(1 + e^b)). Takes the place of ChannelMix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.aa = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.bb = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor, x_prev: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), x_prev (B, D) -> out (B, T, D) and the state after it."""
        shifted = token_shift(x, x_prev)
        # FSDP has weights in bfloat16 where autocast leaves x in float32
        a = self.aa(torch.lerp(shifted, x, self.time_mix_k.to(x.dtype)))  # (B, T, F)
        b = self.bb(torch.lerp(shifted, x, self.time_mix_r.to(x.dtype)))  # (B, T, F)
        return self.value(a * F.mish(b)), x[:, -1].clone()


def position_embedding(pos_emb_x: Tensor, pos_emb_y: Tensor, read: Tensor, T: int) -> Tensor:
    """The embedding of the next T positions (B, T, D) after `read` (B,) tokens.

    Position p is the point (p // n, p % n) of the square: pos_emb_y (n, 1, D) gives its row, pos_emb_x (1, n, D) its
    column. The last point belongs to no token: a window of n^2 numbers has n^2 - 1 inputs.

    Raises:
        ValueError: there are more than n^2 - 1 tokens.
    """
    n = pos_emb_x.shape[1]
    last = int(read.max()) + T
    if last > n * n - 1:
        raise ValueError(
            f"RWKV: {last} tokens, but my_pos_emb = {n} has places for {n} x {n} - 1 = {n * n - 1}: read shorter "
            "pieces, each without a state, or train with a larger my_pos_emb"
        )
    table = (pos_emb_x + pos_emb_y).flatten(0, 1)  # (n^2, D)
    return F.embedding(read[:, None] + torch.arange(T, device=read.device), table)


def add_tiny_attention(block: nn.Module, config: ModelConfig) -> None:
    """Give a block the parameters of the tiny attention, under their official names."""
    block.tiny_ln = nn.LayerNorm(config.n_embd)
    block.tiny_q = nn.Linear(config.n_embd, config.tiny_att_dim, bias=False)
    block.tiny_k = nn.Linear(config.n_embd, config.tiny_att_dim, bias=False)
    block.tiny_v = nn.Linear(config.n_embd, config.n_embd, bias=False)
    # Official files hold the causal mask. It is written for them; the computation below needs no table.
    block.register_buffer("tiny_mask", torch.empty(config.ctx_len, config.ctx_len))


def tiny_attention(block: nn.Module, x: Tensor, x_emb: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What the tiny attention adds to x (B, T, D), and its state (B, d, D), the sum of k^T v, after it.

    Queries and keys are made from x, values from x_emb (B, T, D): the tokens as they were before ln0.
    """
    normed = block.tiny_ln(x)
    q, k, v = block.tiny_q(normed), block.tiny_k(normed), block.tiny_v(x_emb)  # (B, T, d) twice, (B, T, D)
    scale = q.shape[-1] ** -0.5
    out = (q @ k.mT * scale).tril() @ v + q.to(state.dtype) @ state * scale  # this piece, and what came before it
    with torch.autocast(x.device.type, enabled=False):  # a sum over all tokens keeps float32
        state = state + k.to(state.dtype).mT @ v.to(state.dtype)
    return out.to(x.dtype), state


def copy_logits(logits: Tensor, q: Tensor, k: Tensor, tokens: Tensor) -> Tensor:
    """head_qk: add to the logits (B, T, V) of the last T of S steps what earlier tokens (B, S) are voted.

    q (B, T, n), k (B, S, n). The product with onehot(tokens) is a sum of votes by token: B T S additions, not B T S V.
    """
    T, S, n = q.shape[1], k.shape[1], q.shape[2]
    votes = (q @ k.mT * (1.0 / n)).tril(S - T)  # (B, T, S)
    wide = torch.promote_types(logits.dtype, torch.float32)  # a frequent token gathers many small votes
    return logits.to(wide).scatter_add(2, tokens.unsqueeze(1).expand_as(votes), votes.to(wide)).to(logits.dtype)


def join_states(states: Sequence[list[Tensor]]) -> list[Tensor]:
    """One state for the rows of several: states of the same model, whatever each has read.

    With head_qk their histories may differ in length. The shorter ones get keys of zero in front, which have no vote.
    """
    joined = []
    for parts in zip(*states, strict=True):
        S = max(x.shape[1] if x.dim() > 1 else 0 for x in parts)
        fill = [(0, 0) * (x.dim() - 2) + (S - x.shape[1], 0) if x.dim() > 1 else (0, 0) for x in parts]
        joined.append(torch.cat([F.pad(x, n) if any(n) else x for x, n in zip(parts, fill, strict=True)]))
    return joined
