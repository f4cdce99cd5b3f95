"""The magic prime and the cubic walk: visit every chunk of a data set once, scattered, and store nothing.

The tokens are cut into slots of ctx_len. Of these the trainer uses the first p, where p, the magic prime, is the
largest prime with p % 3 == 2 and p <= slots - 1 (so that the last window of ctx_len + 1 tokens ends inside the data).
Sample number ii = 1, 2, 3, ... of a whole training run, counted over epochs and GPUs, is chunk

    (f * ii**3) % p        f = int(p * (sqrt(5) - 1) / 2), the golden-ratio factor

Since 3 does not divide p - 1, cubing permutes 0..p-1: p samples in a row, from any start, are p different chunks.

What it is not: a random shuffle (the order is the same in every run and repeats after p samples, by design: restarting
needs only ii), nor a reader of data (that is rwkv_nb.data.dataset, which also knows my_pile_shift and my_random_steps).

Symbols: p prime, ii sample number from 1, S samples_per_epoch (40320 = 8! in the official trainer).
Source: RWKV-LM `RWKV-v5/make_data.py` (the prime) and `RWKV-v5/src/dataset.py` (the walk), December 2023.
"""

from __future__ import annotations

import argparse
import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLES_PER_EPOCH = 40320  # the official mini-epoch: 8!, which batch sizes 1 to 10, 12, 14, 16, 18, 20, 24 ... divide
RATIO_2023 = 0.99  # train.py of December 2023 demands prime / slots above this
RATIO_TODAY = 0.9  # train.py since 26 April 2024


def is_prime(n: int) -> bool:
    """Whether the integer n is prime: exact below 2**64; above it a strong test (BPSW) with no known exception.

    Raises ValueError if n is not an integer: 7.0 is refused too, because a float cannot hold every large prime.
    """
    from sympy import isprime  # 0.3 s to import, and only this needs it

    return bool(isprime(_integer("n", n)))


def magic_prime(n_tokens: int, ctx_len: int) -> int | None:
    """The largest prime p with p % 3 == 2 and p <= n_tokens // ctx_len - 1; None if n_tokens < 3 * ctx_len.

    n_tokens, ctx_len: in tokens, of any size. Raises ValueError if ctx_len < 1 or n_tokens < 0.
    Source: `make_data.py`; its comment says "smaller than data / ctx - 1", its code takes "at most", as here.

    >>> magic_prime(1498226207, 512), magic_prime(100, 64)
    (2926181, None)
    """
    candidate = _slots(n_tokens, ctx_len) - 1
    candidate -= (candidate - 2) % 3  # down to the next number with remainder 2
    while candidate >= 2:
        if is_prime(candidate):
            return candidate
        candidate -= 3
    return None


@dataclass(frozen=True)
class MagicPrime:
    """What `explain` returns: the prime and what follows from it. `str()` of it is a report to print."""

    n_tokens: int
    ctx_len: int
    slots: int  # n_tokens // ctx_len
    prime: int | None
    ratio: float  # prime / slots: the share of the data that is ever read; 0.0 without a prime
    mini_epochs: int  # whole mini-epochs of 40320 samples in one pass: what the official trainer calls epoch_count
    accepted_2023: bool  # 0.99 < ratio <= 1, demanded by train.py in December 2023
    accepted_today: bool  # 0.9 < ratio <= 1, demanded since April 2024
    reason: str  # why there is no prime; empty if there is one
    flags: str  # to paste after `train`; empty without a prime

    def __str__(self) -> str:
        if self.prime is None:
            return f"magic_prime: none for ctx_len {self.ctx_len}: {self.reason}"
        lines = [
            f"magic_prime = {self.prime} for ctx_len {self.ctx_len}: {self.ratio:.4f} of {self.slots} slots",
            f"one pass = {self.prime} samples = {self.mini_epochs} whole mini-epochs of {SAMPLES_PER_EPOCH} samples",
            f"flags: {self.flags}",
        ]
        if not self.accepted_2023:
            who, limits = "official trainer of December 2023 refuses", "limit 0.99"
            if not self.accepted_today:
                who, limits = "official trainers of December 2023 and of today refuse", "limits 0.99 and 0.9"
            lines.append(f"note: the {who} this ratio ({limits}); this course's does not")
        if self.mini_epochs == 0:
            times = SAMPLES_PER_EPOCH / self.prime
            lines.append(f"note: small data: one mini-epoch reads each chunk {times:.1f} times; a smaller ctx_len "
                         "gives more chunks, and training should stop early")
        return "\n".join(lines)


def explain(n_tokens: int, ctx_len: int) -> MagicPrime:
    """The magic prime of n_tokens tokens at ctx_len, with ratio, mini-epochs and the official trainers' verdict."""
    slots, prime = _slots(n_tokens, ctx_len), magic_prime(n_tokens, ctx_len)
    if prime is None:
        reason = (f"{n_tokens} tokens are fewer than 3 * ctx_len = {3 * ctx_len}; "
                  f"use ctx_len {n_tokens // 3} or less, or more data" if n_tokens >= 3 else
                  f"{n_tokens} tokens: no ctx_len is small enough; use more data")
        return MagicPrime(n_tokens, ctx_len, slots, None, 0.0, 0, False, False, reason, "")
    ratio = prime / slots
    flags = f"--my_exit_tokens {n_tokens} --magic_prime {prime} --ctx_len {ctx_len}"
    return MagicPrime(n_tokens, ctx_len, slots, prime, ratio, prime // SAMPLES_PER_EPOCH,
                      ratio > RATIO_2023, ratio > RATIO_TODAY, "", flags)


def golden_factor(prime: int) -> int:
    """f = int(p * (sqrt(5) - 1) / 2), in the same float64 arithmetic as the official trainer.

    Beyond 2**53 p is rounded to a float first, so that f differs from the exact floor in its low digits. That is
    harmless, 0 < f < p holds all the same and f * ii**3 still permutes, but it must be reproduced to walk the same way.
    """
    return int(prime * ((math.sqrt(5) - 1) / 2))


def sample_number(epoch: int, idx: int, rank: int, world_size: int, samples_per_epoch: int = SAMPLES_PER_EPOCH) -> int:
    """ii: the number of a sample within the whole run, from 1. See `sample_offset` for the arguments."""
    epoch, idx, rank = _integer("epoch", epoch), _integer("idx", idx), _integer("rank", rank)
    world_size, per_epoch = _integer("world_size", world_size), _integer("samples_per_epoch", samples_per_epoch)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, world_size {world_size}: ranks count from 0 to world_size - 1")
    if epoch < 0 or idx < 0 or per_epoch < 1:
        raise ValueError(f"epoch {epoch} and idx {idx} must be 0 or more, samples_per_epoch {per_epoch} at least 1")
    return 1 + epoch * per_epoch + idx * world_size + rank


def chunk_of(prime: int, ii: int) -> int:
    """The chunk, 0 to prime - 1, that sample number ii visits. Python integers: f * ii**3 soon exceeds 64 bits."""
    return golden_factor(prime) * ii * ii * ii % prime


def sample_offset(prime: int, ctx_len: int, epoch: int, idx: int, rank: int, world_size: int,
                  samples_per_epoch: int = SAMPLES_PER_EPOCH) -> int:
    """Where, in tokens, the window of a sample starts: the official walk, exact at any size.

    prime: the magic prime (not checked to be one here). epoch: counted over restarts (epoch_begin + epochs since).
    idx: the DataLoader's index within the epoch on one GPU, 0 to epoch_steps * micro_bsz - 1. rank, world_size: this
    GPU among all. Raises ValueError for rank outside 0..world_size - 1, negative counts, prime < 2, or ctx_len < 1.
    Source: `RWKV-v5/src/dataset.py`, with my_pile_shift = my_random_steps = 0.

    >>> [sample_offset(2926181, 512, 0, i, 0, 1) for i in range(3)]
    [925941248, 1414711296, 1029138944]
    """
    prime, ctx_len = _integer("prime", prime), _integer("ctx_len", ctx_len)
    if prime < 2 or ctx_len < 1:
        raise ValueError(f"prime is {prime}, ctx_len {ctx_len}: prime must be at least 2, ctx_len at least 1")
    return chunk_of(prime, sample_number(epoch, idx, rank, world_size, samples_per_epoch)) * ctx_len


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m rwkv_nb magic_prime`: the prime on stdout, alone, for scripts; what it means on stderr, for people."""
    parser = argparse.ArgumentParser("python -m rwkv_nb magic_prime", description="The largest prime that walks "
                                     "through a data set in windows of CTX_LEN tokens.")
    parser.add_argument("data", metavar="DATA", help="prefix of .bin and .idx, or a number of tokens")
    parser.add_argument("ctx_len", metavar="CTX_LEN", type=int, help="tokens in a training window")
    parser.add_argument("--flags", action="store_true", help="print --my_exit_tokens, --magic_prime and --ctx_len "
                                                             "ready for `train`, in place of the prime alone")
    args = parser.parse_args(argv)
    if args.data.isdecimal():
        n_tokens = int(args.data)
    else:
        from rwkv_nb.data.binidx import MMapIndexedDataset  # here: arithmetic alone needs no files

        with MMapIndexedDataset(args.data) as data:
            n_tokens = data.n_tokens
    found = explain(n_tokens, args.ctx_len)
    if found.prime is None:
        raise ValueError(f"{args.data}: {found.reason}")
    print(found, file=sys.stderr)
    print(found.flags if args.flags else found.prime)
    return 0


def _slots(n_tokens: int, ctx_len: int) -> int:
    n_tokens, ctx_len = _integer("n_tokens", n_tokens), _integer("ctx_len", ctx_len)
    if ctx_len < 1 or n_tokens < 0:
        raise ValueError(f"n_tokens is {n_tokens}, ctx_len {ctx_len}: ctx_len must be at least 1, n_tokens at least 0")
    return n_tokens // ctx_len


def _integer(name: str, value: int) -> int:
    """value as a Python integer (numpy's integers would overflow later); ValueError if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}: it must be an integer") from None
