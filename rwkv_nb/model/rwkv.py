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
from torch.utils.checkpoint import checkpoint

from .block import Block
from .config import ModelConfig
from .initialization import causal_mask, init_weights
from .loss import l2wrap_cross_entropy
from .options import copy_logits, position_embedding
from .weights import check_weights, load_weights

__all__ = ["RWKV", "check_weights", "l2wrap_cross_entropy", "load_weights"]


class RWKV(nn.Module):
    """The model: token ids (B, T) -> logits (B, T, V).

    Args:
        config: the sizes.
        weights: name -> tensor, taken as they are (shared, not copied); None: `init_weights(config)`.

    Attributes:
        grad_cp: True: in training each block keeps only its input and computes the rest again in the backward pass.
            The gradients are the same; it takes less memory and a third more time.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.config = config
        self.grad_cp = False
        with torch.device("meta"):  # shapes only: the numbers come from `weights`
            self.emb = nn.Embedding(config.vocab_size, config.n_embd)
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
            self.ln_out = nn.LayerNorm(config.n_embd)
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            if config.head_qk > 0:
                self.head_q = nn.Linear(config.n_embd, config.head_qk, bias=False)
                self.head_k = nn.Linear(config.n_embd, config.head_qk, bias=False)
                # Official files hold the causal mask: it is written for them, `copy_logits` needs no table.
                self.register_buffer("copy_mask", torch.empty(config.ctx_len, config.ctx_len))
        weights = init_weights(config) if weights is None else weights
        # The masks of the options follow from ctx_len alone, so a file may lack them or be of another ctx_len.
        masks = {name: causal_mask(config).to(weights["emb.weight"]) for name, _ in self.named_buffers()}
        self.load_state_dict({**weights, **masks}, assign=True)

    def new_state(self, batch_size: int = 1) -> list[Tensor]:
        """The state before the first token, as `forward` takes and returns it."""
        c, B, weight = self.config, batch_size, self.emb.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        state: list[Tensor] = []
        for i in range(c.n_layer):
            H = 0 if i == 0 and c.pre_ffn else c.n_head
            wkv = weight.new_zeros(B, H, c.head_size_a, c.head_size_a, dtype=wide)
            state += [weight.new_zeros(B, c.n_embd), wkv, weight.new_zeros(B, c.n_embd)]
        if c.tiny_att_dim > 0:
            state.append(weight.new_zeros(B, c.tiny_att_dim, c.n_embd, dtype=wide))
        if c.my_pos_emb > 0:
            state.append(weight.new_zeros(B, dtype=torch.long))
        if c.head_qk > 0:
            state += [weight.new_zeros(B, 0, dtype=torch.long), weight.new_zeros(B, 0, c.head_qk)]
        return state

    def forward(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Read T tokens for each of B rows.

        The gradient flows back through `state`, so that a text longer than ctx_len can be trained on in pieces as if
        it were one; pass `[s.detach() for s in state]` to end it at the border, which frees the pieces before.

        Args:
            idx: (B, T) token ids, T >= 1.
            state: what an earlier call returned, or None for a fresh start. It is not changed.
            full_output: logits of every position; False: of the last alone (B, 1, V), which saves most of the work
                of a large vocabulary while a prompt is read.

        Returns:
            logits (B, T, V) for the token after each position, and the state after the last: for each layer
            att x_prev (B, D), wkv (B, H, N, N) as [key, value] in float32, ffn x_prev (B, D). Options add at the end:
            tiny attention (B, d, D); the number of tokens read (B,) for the position embedding; for head_qk all tokens
            (B, S) and their keys (B, S, n).

        Raises:
            ValueError: idx or state has a wrong shape, a token id is outside the vocabulary, or the position embedding
                has no place for so many tokens.
        """
        x, new_state = self.hidden(idx, state)
        last = x if full_output else x[:, -1:]
        logits = self.head(last)
        if self.config.head_qk > 0:
            tokens, keys = idx, self.head_k(x)
            if state is not None:
                tokens, keys = torch.cat((state[-2], tokens), 1), torch.cat((state[-1].to(keys.dtype), keys), 1)
            logits = copy_logits(logits, self.head_q(last), keys, tokens)
            new_state += [tokens, keys]
        return logits, new_state

    def hidden(self, idx: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """What the head sees: ln_out's output (B, T, D), and the state after it, without head_qk's part."""
        c = self.config
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"RWKV: idx must be (B, T) with at least one token, got shape {tuple(idx.shape)}")
        if idx.device.type == "cpu" and idx.numel() and not 0 <= int(idx.min()) <= int(idx.max()) < c.vocab_size:
            raise ValueError(
                f"RWKV: token ids run from {int(idx.min())} to {int(idx.max())}, but this model has vocab_size = "
                f"{c.vocab_size}: was the text encoded with another tokenizer?"
            )
        state = self._checked(state, idx.shape[0])
        options = state[3 * c.n_layer :]
        tiny_state = options.pop(0) if c.tiny_att_dim > 0 else None

        x_emb = self.emb(idx)  # (B, T, D)
        first = self.blocks[0]
        x = first.ln0(F.dropout(x_emb, c.dropout, self.training))
        if c.my_pos_emb > 0:
            read = options.pop(0)  # (B,)
            x = x + position_embedding(first.pos_emb_x, first.pos_emb_y, read, idx.shape[1])
        new_state: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            inputs = (x, state[3 * i : 3 * i + 3], x_emb, tiny_state)
            if self.grad_cp and torch.is_grad_enabled():
                x, after = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=c.dropout > 0)
            else:
                x, after = block(*inputs)
            new_state += after[:3]
            if block.has_tiny_att:
                tiny_state = after[3]
        if c.tiny_att_dim > 0:
            new_state.append(tiny_state)
        if c.my_pos_emb > 0:
            new_state.append(read + idx.shape[1])
        return self.ln_out(x), new_state

    def _checked(self, state: list[Tensor] | None, B: int) -> list[Tensor]:
        """The state for B rows; raises ValueError if it is not of this model."""
        c = self.config
        if state is None:
            return self.new_state(B)
        more = (c.tiny_att_dim > 0) + (c.my_pos_emb > 0) + 2 * (c.head_qk > 0)
        n = 3 * c.n_layer + more
        if len(state) != n or state[0].shape != (B, c.n_embd):
            raise ValueError(
                f"RWKV: the state must be 3 x n_layer {f'+ {more} ' if more else ''}= {n} tensors for {B} rows of "
                f"{c.n_embd}, got {len(state)} tensors, the first of shape {tuple(state[0].shape) if state else None}"
            )
        return list(state)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | None = torch.float32, mmap: bool = False,
        **known: object,
    ) -> RWKV:
        """Load a `.pth` file of the official trainer or of this package; sizes are read from its shapes.

        Args:
            path: the file. Weights only: a file that would run code is refused.
            dtype: what the weights are converted to; None keeps the file's (bfloat16 in official files).
            mmap: see `load_weights`; for weights that are copied elsewhere and then dropped.
            known: what a file does not tell, passed to `ModelConfig.from_state_dict` (ctx_len, dropout, …).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not readable as weights, not RWKV-5.2, keys missing or foreign, or a shape wrong.
        """
        weights = load_weights(path, mmap=mmap)
        try:
            config = ModelConfig.from_state_dict(weights, **known)
            check_weights(config, weights)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if dtype is not None:
            for key in weights:
                weights[key] = weights[key].to(dtype)  # one by one: never the whole model twice
        return cls(config, weights)
