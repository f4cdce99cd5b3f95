"""From logits to one token: top-p, top-k, temperature, a draw.

Order and meaning are those of the `rwkv` package (top_p first, then top_k, then temperature), and the probabilities
agree with it wherever it is right. Where it is not: top_p = 1 keeps everything (there, a cumulative sum that rounds to
below 1 makes it greedy), a very small temperature does not divide zero by zero (powers are taken as logarithms),
and tokens of equal probability at the cut are taken in the order of their ids, not all of them.

Symbols: V vocabulary size, p probabilities. Everything is computed on the CPU in float64, row by row. What it is not:
the penalties for repetition, which need the history of a text: see `row.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 4096  # a vocabulary from here on is not sorted as a whole, nor given a random number for each token
LIKELIEST = 512  # tokens that mostly are enough for top_p


@dataclass(frozen=True)
class SamplingArgs:
    """How to choose the next token; the fields and defaults of the package's PIPELINE_ARGS.

    temperature: 0 always takes the likeliest token; below 1 sharpens, above 1 flattens.
    top_p: keep the likeliest tokens that together reach this probability. top_k: keep at most so many; 0: no limit.
    alpha_presence, alpha_frequency: subtracted from the logit of a token that was generated, once and for each
        occurrence. alpha_decay: what the occurrences are multiplied by at each step.
    token_ban: ids that are never drawn. token_stop: ids that end the text. chunk_len: prompt tokens read at a time.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    alpha_frequency: float = 0.2
    alpha_presence: float = 0.2
    alpha_decay: float = 0.996
    token_ban: tuple[int, ...] = ()
    token_stop: tuple[int, ...] = ()
    chunk_len: int = 256

    def __post_init__(self) -> None:
        _check_filter("SamplingArgs", self.temperature, self.top_p, self.top_k)
        for name in ("alpha_frequency", "alpha_presence"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"SamplingArgs: {name} = {getattr(self, name)} must be a finite number")
        if not 0 <= self.alpha_decay <= 1:
            raise ValueError(f"SamplingArgs: alpha_decay = {self.alpha_decay} must be from 0 to 1")
        for name in ("token_ban", "token_stop"):
            ids = tuple(getattr(self, name))
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ValueError(f"SamplingArgs: {name} = {ids!r} must hold token ids, whole numbers from 0 up")
            object.__setattr__(self, name, ids)
        if not isinstance(self.chunk_len, int) or self.chunk_len < 1:
            raise ValueError(f"SamplingArgs: chunk_len = {self.chunk_len!r} must be a whole number of at least 1")


def _check_filter(where: str, temperature: float, top_p: float, top_k: int) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{where}: temperature = {temperature} must be a finite number of at least 0")
    if not 0 <= top_p <= 1:
        raise ValueError(f"{where}: top_p = {top_p} must be from 0 to 1; 1 keeps every token")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"{where}: top_k = {top_k!r} must be a whole number; 0 means no limit")


def filter_probs(logits: Tensor, temperature: float = 1.0, top_p: float = 0.85, top_k: int = 0) -> Tensor:
    """The probabilities a token is drawn with: logits (V,) -> (V,) float64, sum 1, zeros for what was cut.

    Rows (B, V) give (B, V). A logit of -inf is a token that is never drawn. The result is on the device of the logits.

    Raises:
        ValueError: logits not (V,) or (B, V), NaN or +inf among them, or nothing left; a setting outside its range.
    """
    _check_filter("filter_probs", temperature, top_p, top_k)
    if logits.dim() not in (1, 2) or logits.shape[-1] == 0:
        raise ValueError(f"filter_probs: logits must be a row (V,) or rows (B, V), got shape {tuple(logits.shape)}")
    if logits.dim() == 2:
        rows = [filter_probs(row, temperature, top_p, top_k) for row in logits.cpu()]
        return torch.stack(rows).to(logits.device) if rows else logits.double()
    log_p = torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=-1)
    if log_p.isnan().any():
        raise ValueError("filter_probs: the logits hold NaN or +inf, or every token is banned (all are -inf)")
    p = log_p.exp()
    kept = _likeliest(p, temperature, top_p, top_k)
    sharpened = (log_p[kept] - log_p[kept[0]]) / (temperature or 1.0)  # the first is the largest: 0
    return torch.zeros_like(p).index_copy_(0, kept, torch.softmax(sharpened, dim=0)).to(logits.device)


def _likeliest(p: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The ids that are kept of probabilities (V,), by falling probability; of equal ones the lower id comes first."""
    if temperature == 0:
        return p.argmax(keepdim=True)  # the first, if several are largest
    # Tokens below (1 - top_p) / V sum to less than 1 - top_p: the rest holds all that top_p can keep, and less to sort.
    least = 0.5 * (1 - top_p) / len(p)
    if len(p) > LARGE:
        top = torch.topk(p, LIKELIEST, sorted=False).values
        if float(top.sum()) > top_p + 1e-9 or 0 < top_k <= LIKELIEST:
            least = max(least, float(top.min()))  # these suffice; all that equal the least of them stay
    candidates = torch.nonzero(p >= least if least > 0 else p > 0).squeeze(1)
    order = candidates[torch.sort(p[candidates], descending=True, stable=True).indices]
    keep = len(order)
    if top_p < 1:
        keep = min(keep, int((p[order].cumsum(0) < top_p).sum()) + 1)
    if top_k > 0:
        keep = min(keep, top_k)
    return order[:keep]


def sample_logits(logits: Tensor, args: SamplingArgs, generator: torch.Generator | None = None) -> int | list[int]:
    """Draw a token id from logits (V,), or one for each of (B, V), without those in args.token_ban.

    Args:
        logits: on any device; not changed.
        generator: a torch.Generator on the CPU; None uses torch's global one.

    Raises:
        ValueError: as `filter_probs`; or a banned id outside the vocabulary.
    """
    if args.token_ban:
        if max(args.token_ban) >= logits.shape[-1]:
            raise ValueError(
                f"sample_logits: token_ban holds {max(args.token_ban)}, the vocabulary ends at {logits.shape[-1] - 1}"
            )
        logits = logits.clone()
        logits[..., list(args.token_ban)] = -math.inf
    probs = filter_probs(logits, args.temperature, args.top_p, args.top_k).cpu()
    if probs.shape[-1] <= LARGE:
        return torch.multinomial(probs, 1, generator=generator).squeeze(-1).tolist()
    # A draw takes a random number for each token that could come: milliseconds, if it is asked for all of them.
    left = torch.nonzero(probs if probs.dim() == 1 else probs.amax(0)).squeeze(1)
    return left[torch.multinomial(probs[..., left], 1, generator=generator)].squeeze(-1).tolist()
