"""RWKV-5.2 "Eagle": the language model, as equations in PyTorch.

One code path for both uses. In training a whole sequence (B, T) goes in at once; in generation one token at a time
(T = 1) with the state of the last call. Parameter names and shapes are those of the official checkpoints.

    x = ln0(emb[token]);   each block:  x += att(ln1 x),  x += ffn(ln2 x);   logits = head(ln_out(x))

Symbols: B batch, T steps, D n_embd, H heads of N channels, V vocabulary. What it is not: the layers (`layers.py`), the
training loop (`rwkv_nb.training`) or a fast runtime for large models (`rwkv_nb.inference`).

Source: arXiv 2404.05892 section 4; `RWKV` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .config import ModelConfig
from .initialization import init_weights
from .loss import l2wrap_cross_entropy
from .weights import check_weights, load_weights

__all__ = ["RWKV", "check_weights", "l2wrap_cross_entropy", "load_weights"]


class RWKV(nn.Module):
    """The model: token ids (B, T) -> logits (B, T, V).

    Args:
        config: the sizes.
        weights: name -> tensor, taken as they are (shared, not copied); None: `init_weights(config)`.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.config = config
        with torch.device("meta"):  # shapes only: the numbers come from `weights`
            self.emb = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
            self.ln_out = nn.LayerNorm(config.n_embd)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.load_state_dict(init_weights(config) if weights is None else weights, assign=True)

    def new_state(self, batch_size: int = 1) -> list[Tensor]:
        """The state before the first token: 3 n_layer zero tensors, as `forward` takes and returns them."""
        c, weight = self.config, self.emb.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        x_shape, wkv_shape = (batch_size, c.n_embd), (batch_size, c.n_head, c.head_size_a, c.head_size_a)
        state: list[Tensor] = []
        for _ in range(c.n_layer):
            state += [weight.new_zeros(x_shape), weight.new_zeros(wkv_shape, dtype=dtype), weight.new_zeros(x_shape)]
        return state

    def forward(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Read T tokens for each of B rows.

        Args:
            idx: (B, T) token ids, T >= 1.
            state: what an earlier call returned, or None for a fresh start. It is not changed.
            full_output: logits of every position; False: of the last alone (B, 1, V), which saves most of the work
                of a large vocabulary while a prompt is read.

        Returns:
            logits (B, T, V) for the token after each position, and the state after the last: for each layer
            att x_prev (B, D), wkv (B, H, N, N) as [key, value] in float32, ffn x_prev (B, D).

        Raises:
            ValueError: idx or state has a wrong shape, or a token id is outside the vocabulary.
        """
        c = self.config
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"RWKV: idx must be (B, T) with at least one token, got shape {tuple(idx.shape)}")
        if idx.device.type == "cpu" and idx.numel() and not 0 <= int(idx.min()) <= int(idx.max()) < c.vocab_size:
            raise ValueError(
                f"RWKV: token ids run from {int(idx.min())} to {int(idx.max())}, but this model has vocab_size = "
                f"{c.vocab_size}: was the text encoded with another tokenizer?"
            )
        if state is None:
            state = self.new_state(idx.shape[0])
        elif len(state) != 3 * c.n_layer or state[0].shape != (idx.shape[0], c.n_embd):
            raise ValueError(
                f"RWKV: the state must be 3 x n_layer = {3 * c.n_layer} tensors for {idx.shape[0]} rows of {c.n_embd}, "
                f"got {len(state)} tensors, the first of shape {tuple(state[0].shape) if state else None}"
            )
        x = self.emb(idx)  # (B, T, D)
        x = self.blocks[0].ln0(F.dropout(x, c.dropout, self.training))
        new_state: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x, after = block(x, state[3 * i : 3 * i + 3])
            new_state += after
        return self.head(self.ln_out(x if full_output else x[:, -1:])), new_state

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32, **known) -> RWKV:
        """Load a `.pth` file of the official trainer or of this package; sizes are read from its shapes.

        Args:
            path: the file. Weights only: a file that would run code is refused.
            dtype: what the weights are converted to; None keeps the file's (bfloat16 in official files).
            known: what a file does not tell, passed to `ModelConfig.from_state_dict` (ctx_len, dropout, …).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not readable as weights, not RWKV-5.2, keys missing or foreign, or a shape wrong.
        """
        weights = load_weights(path)
        try:
            config = ModelConfig.from_state_dict(weights, **known)
            check_weights(config, weights)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if dtype is not None:
            for key in weights:
                weights[key] = weights[key].to(dtype)  # one by one: never the whole model twice
        return cls(config, weights)
