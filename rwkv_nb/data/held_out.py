"""The end of the data, held out: windows that training never reads, to tell learning from learning by heart.

    training, held_out = split(source, ctx_len=512, fraction=0.01)

It is: a cut by whole windows of ctx_len tokens, and a view of each side. It is not: a loss (see training.validation).
Held out are the last windows, floor(fraction * slots) of them and at least one, each with its target. Data whose
documents come in an order of their own (by date, by author) should be shuffled first, as make_data does.
Symbols: slots = n_tokens // ctx_len, as in magic_prime. The official trainer has no such thing.
"""

from __future__ import annotations

import math

import numpy as np

from rwkv_nb.data import sources


class Part(sources.Source):
    """Tokens first to last - 1 of another source, under its name."""

    def __init__(self, whole: sources.Source, first: int, last: int):
        super().__init__(whole.path)
        self.whole, self.first, self.last, self.what = whole, first, last, whole.what
        self.meta = getattr(whole, "meta", None)

    def _open(self) -> np.ndarray:
        return self.whole.tokens[self.first : self.last]

    @property
    def n_tokens(self) -> int:
        return self.last - self.first

    @property
    def tokenizer(self) -> object:
        return self.whole.tokenizer

    def check_tokenizer(self, name: str, sha256: str | None) -> None:
        self.whole.check_tokenizer(name, sha256)


def n_held_out(n_tokens: int, ctx_len: int, fraction: float) -> int:
    """How many windows are held out. Raises ValueError if not one is left on each side."""
    windows = max(1, math.floor(fraction * (n_tokens // ctx_len)))
    left = (n_tokens - 1) // ctx_len - windows
    if left < 1:
        raise ValueError(f"val_split is {fraction}: of {n_tokens} tokens in windows of ctx_len {ctx_len} nothing would "
                         "be left to train on; use a smaller val_split or ctx_len, or more data")
    return windows


def n_training(n_tokens: int, ctx_len: int, fraction: float) -> int:
    """How many tokens are left for training: those before the first held-out window. fraction 0: all of them."""
    if fraction <= 0:
        return n_tokens
    return ((n_tokens - 1) // ctx_len - n_held_out(n_tokens, ctx_len, fraction)) * ctx_len


def split(source: sources.Source, ctx_len: int, fraction: float) -> tuple[sources.Source, sources.Source | None]:
    """(training part, held-out part) of a flat source; (source, None) for fraction 0. Raises ValueError."""
    if not 0 <= fraction < 1:
        raise ValueError(f"val_split is {fraction}: it is a fraction of the data, at least 0 and below 1")
    if fraction == 0:
        return source, None
    if isinstance(source, (sources.Mixture, sources.Rows)):
        raise ValueError(f"val_split is {fraction}: only one flat run of tokens has an end to hold out, not a list of "
                         "pairs (my_pile_version 2) nor rows (data_type uint16); use val_split 0")
    cut = n_training(source.n_tokens, ctx_len, fraction)
    return Part(source, 0, cut), Part(source, cut, source.n_tokens)
