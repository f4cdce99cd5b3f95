"""Which window a sample reads: the cubic walk of the magic prime, a random place, or a turn of the mixing data.

A sample is named by (epoch, idx) on this rank; where it reads depends on nothing else but the settings, so a restarted
run reads what the first run would have read, and workers and GPUs never read the same by accident.

What it is not: a torch Sampler; it maps a DataLoader's index to a place. Leave shuffling and Lightning's distributed
sampler off: the rank is already in ii.

Symbols: ii sample number of the whole run, from 1 (magic_prime.sample_number); S samples_per_epoch; p magic_prime.
Source: RWKV-LM `RWKV-v5/src/dataset.py`, December 2023. The walk is the same number for number. Random places are not:
the official code draws them from numpy's global generator, which makes them depend on worker processes and restarts.
Here they come from (seed, epoch, rank, idx), and the very last window can be drawn too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rwkv_nb.data.magic_prime import RATIO_2023, RATIO_TODAY, SAMPLES_PER_EPOCH, chunk_of, explain, is_prime
from rwkv_nb.data.magic_prime import sample_number as number_of


class Place(NamedTuple):
    """Where a sample starts, in tokens. mixed: in the mixing data (qa_pile_file) in place of the user's."""

    start: int
    mixed: bool


@dataclass(frozen=True)
class StartSampler:
    """place(epoch, idx) for one rank. `n_starts`: how many places a random start may have; likewise `n_mix_starts`."""

    ctx_len: int
    n_starts: int
    samples_per_epoch: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    stage: int = 0
    prime: int = 0
    shift: int = 0
    random_steps: int = 0
    qa_mask: int = 0
    n_mix_starts: int = 0

    @property
    def walks(self) -> bool:
        """Whether the prime is used: stages 1 to 3."""
        return self.stage > 0 and self.stage != 4

    def place(self, epoch: int, idx: int) -> Place:
        """Where sample idx of `epoch` (counted over restarts) starts. Exact integers throughout."""
        if self.stage > 0:
            ii = number_of(epoch, idx, self.rank, self.world_size, self.samples_per_epoch)
            if self.qa_mask > 0:
                if ii % 2 == 0:  # every other sample of the run is general text
                    return self.mixing_place(epoch, idx)
                ii //= 2
            if self.walks and ii >= self.random_steps:
                return Place(chunk_of(self.prime, ii - self.random_steps) * self.ctx_len + self.shift, False)
        return Place(self._draw(epoch, idx, self.n_starts, 0), False)

    def mixing_place(self, epoch: int, idx: int) -> Place:
        """A random place in the mixing data."""
        return Place(self._draw(epoch, idx, self.n_mix_starts, 1), True)

    def _draw(self, epoch: int, idx: int, n: int, stream: int) -> int:
        return int(np.random.default_rng((self.seed, epoch, self.rank, idx, stream)).integers(n))


def check_prime(prime: int, n_tokens: int, n_starts: int, ctx_len: int, shift: int,
                samples_per_epoch: int) -> list[str]:
    """Notes on a usable magic prime; ValueError, naming the right one, for an unusable one.

    Usable: prime, remainder 2 by 3, and its last window, from (p - 1) * ctx_len + shift on, is one of the n_starts that
    lie inside the data (n_tokens - ctx_len, where the data is one piece). A small p / slots is only a note: official
    trainers demand more than 0.99 (2023) or 0.9 (2024); their own demo data at ctx_len 4096 has 47 of 48 slots.
    """
    slots, best = n_tokens // ctx_len, explain(n_tokens, ctx_len)
    remedy = f"use {best.flags}" if best.prime else f"there is none for this data: {best.reason}"
    if prime < 2 or not is_prime(prime):
        raise ValueError(f"magic_prime is {prime}, which is not a prime number; {remedy}")
    if prime % 3 != 2:
        raise ValueError(f"magic_prime is {prime}, and {prime} % 3 is {prime % 3}, not 2: the walk would leave out two "
                         f"thirds of the chunks; {remedy}")
    if prime > slots:
        raise ValueError(f"magic_prime is {prime}, but {n_tokens} tokens have only {slots} slots of ctx_len {ctx_len}; "
                         f"{remedy}")
    last = (prime - 1) * ctx_len + shift
    if last >= n_starts:
        raise ValueError(f"magic_prime {prime}, ctx_len {ctx_len} and my_pile_shift {shift} put the last window, with "
                         f"its target, at {last} to {last + ctx_len + 1}, past the end of {n_tokens} tokens; use a "
                         f"smaller my_pile_shift or {remedy.removeprefix('use ')}")
    notes, ratio = [], prime / slots
    for limit, who in ((RATIO_2023, "the official trainer of December 2023"), (RATIO_TODAY, "today's")):
        if ratio <= limit:
            notes.append(f"magic_prime / slots = {prime}/{slots} = {ratio:.3f}: {who} refuses it (limit {limit})")
    if best.prime is not None and prime < best.prime:
        notes.append(f"magic_prime {prime} is smaller than it could be: {remedy}")
    if samples_per_epoch > prime:
        notes.append(f"small data: one mini-epoch of {samples_per_epoch} samples reads each chunk "
                     f"{samples_per_epoch / prime:.1f} times")
    if samples_per_epoch != SAMPLES_PER_EPOCH:
        notes.append(f"a mini-epoch has {samples_per_epoch} samples, the official one {SAMPLES_PER_EPOCH}")
    return notes
