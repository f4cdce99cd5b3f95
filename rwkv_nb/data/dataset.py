"""The training data set: windows of ctx_len + 1 tokens as (x, y), for every data type of the official trainer.

    data = TokenDataset(data_file="data/demo", data_type="binidx", vocab_size=65536, ctx_len=512, my_pile_stage=3,
                        magic_prime=389, epoch_steps=100, micro_bsz=4, rank=0, world_size=1)
    data.set_epoch(0)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=False, drop_last=True)

Rank, world size and epoch are given, never found out: a DataLoader's workers may start before a trainer's hooks run.
Call `set_epoch` before iterating; workers that live on see it too. With Lightning, pass use_distributed_sampler=False.

What it is not: a tokenizer or a reader of files (sources.py), the order of windows (sampler.py), documents kept apart
(a window runs through the ends of documents, as in the official trainer; token 0 is the only mark).
Source: RWKV-LM `RWKV-v5/src/dataset.py`, December 2023. Differences: errors that say what to do, seeded random places,
stages 1 to 4 for every flat data type, mixing data by qa_pile_file in place of a path on the author's cluster.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from rwkv_nb.data import held_out, sources, tokenizer
from rwkv_nb.data.sampler import StartSampler, check_prime


@dataclass(frozen=True)
class DataConfig:
    """The official flags that concern data, by their names and defaults (proj_dir apart), and three of our own.

    Official: vocab_size 0 means "from the data" (text only). epoch_steps: batches a mini-epoch on each GPU.
    my_pile_stage: 0 random places; 1 to 3 the magic prime's walk; 4 random places, counted in mini-epochs.
    my_pile_shift: tokens by which the walk is shifted; -1 is 0. my_random_steps: the first samples that go to random
    places. my_qa_mask: 0 no, 1 mix and mask the loss, 2 mix only.
    Ours: proj_dir "" writes no vocab.json (official "out"); qa_pile_file: prefix of the binidx pair mixed in by
    my_qa_mask; qa_mask_ids: the tokens after which an answer begins, by default "\\n\\nA:" of the 20B tokenizer
    (as a flag: "187,187,34,27"); val_split: the fraction at the end of the data that is held out.
    """

    data_file: str = ""
    data_type: str = "utf-8"
    vocab_size: int = 0
    ctx_len: int = 1024
    epoch_steps: int = 1000
    epoch_begin: int = 0
    micro_bsz: int = 12
    my_pile_version: int = 1
    my_pile_stage: int = 0
    my_pile_shift: int = -1
    my_random_steps: int = 0
    my_qa_mask: int = 0
    magic_prime: int = 0
    my_sample_len: int = 0
    proj_dir: str = ""
    qa_pile_file: str = ""
    qa_mask_ids: tuple[int, ...] = (187, 187, 34, 27)
    val_split: float = 0.0

    @classmethod
    def from_flags(cls, flags: object) -> DataConfig:
        """The fields that `flags` (a TrainConfig, an argparse namespace) has, defaults for the rest."""
        return cls(**{f.name: getattr(flags, f.name) for f in fields(cls) if hasattr(flags, f.name)})

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {expected}")

        if self.data_type not in sources.DATA_TYPES:
            refuse("data_type", f"one of {', '.join(sources.DATA_TYPES)}")
        for name in ("ctx_len", "epoch_steps", "micro_bsz"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        for name in ("epoch_begin", "my_random_steps", "vocab_size", "magic_prime"):
            if getattr(self, name) < 0:
                refuse(name, "0 or more")
        if self.my_pile_stage not in range(5):
            refuse("my_pile_stage", "0, 1, 2, 3 or 4")
        if self.my_pile_shift < -1:
            refuse("my_pile_shift", "-1 (none), 0 or more")
        if self.my_pile_version not in (1, 2):
            refuse("my_pile_version", "1 (one pair) or 2 (a list of pairs)")
        if self.my_qa_mask not in (0, 1, 2):
            refuse("my_qa_mask", "0, 1 or 2")
        if (self.my_pile_version == 2 or self.my_qa_mask) and self.data_type != "binidx":
            refuse("data_type", "binidx for my_pile_version 2 and for my_qa_mask")
        if self.vocab_size == 0 and self.data_type not in sources.TEXT_TYPES:
            refuse("vocab_size", f"given for data_type {self.data_type}, e.g. 65536 for the World tokenizer")
        if isinstance(self.qa_mask_ids, str):
            ids = self.qa_mask_ids.split(",")
            if not all(part.strip().isdecimal() for part in ids):
                refuse("qa_mask_ids", "token ids with commas between, such as 187,187,34,27")
            object.__setattr__(self, "qa_mask_ids", tuple(int(part) for part in ids))
        if self.my_qa_mask and not self.qa_pile_file:
            refuse("qa_pile_file", f"the prefix of the binidx pair that my_qa_mask {self.my_qa_mask} mixes in")


class TokenDataset(torch.utils.data.Dataset):
    """data[idx] -> (x, y), int64 (ctx_len,), y one token ahead of x; with my_qa_mask 1 (x, y, mask), mask float32.

    Built from a DataConfig, or from its fields as keywords. rank, world_size: of this process among all that train.
    seed: of the random places, 0 or more. tokenizer: who reads the text (anything with .name and .sha256), to be held
    against PREFIX.meta.json; by default the World tokenizer where vocab_size is 65536.
    For data_type uint16, x and y have my_sample_len - 1 tokens and rows are drawn at random in every stage.
    vocab_size, n_tokens, real_epoch, notes (list of str) and `describe()` say what came out. Raises ValueError.
    """

    def __init__(self, config: DataConfig | None = None, *, rank: int = 0, world_size: int = 1, seed: int = 0,
                 tokenizer: object = None, **flags: object):
        if config is not None and flags:
            raise ValueError(f"give a DataConfig or its fields, not both: {', '.join(flags)}")
        self.config = c = config if config is not None else DataConfig(**flags)
        if not 0 <= rank < world_size or seed < 0:
            raise ValueError(f"rank {rank}, world_size {world_size}, seed {seed}: rank must be 0 to world_size - 1 and "
                             "seed 0 or more")
        self.rank, self.world_size, self.notes = rank, world_size, []
        self.samples_per_epoch = c.epoch_steps * c.micro_bsz * world_size
        self.source, self.held_out = held_out.split(sources.open_source(c), c.ctx_len, c.val_split)
        self.mixing = sources.Binidx(c.qa_pile_file) if c.my_qa_mask else None
        self.vocab_size = self.source.tokenizer.vocab_size if c.data_type in sources.TEXT_TYPES else c.vocab_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that living workers see set_epoch
        self.sampler = self._make_sampler(seed)
        self._check_tokenizer(tokenizer)
        self._check_some_windows()
        if c.data_type in sources.TEXT_TYPES and c.proj_dir and rank == 0:
            os.makedirs(c.proj_dir, exist_ok=True)
            self.source.tokenizer.save(Path(c.proj_dir) / "vocab.json")

    @property
    def n_tokens(self) -> int:
        return self.source.n_tokens

    @property
    def real_epoch(self) -> int:
        """The mini-epoch counted over restarts: epoch_begin + the one given to `set_epoch`."""
        return self.config.epoch_begin + int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which mini-epoch since the (re)start begins, from 0: the trainer's current_epoch."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}: it counts from 0")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.config.epoch_steps * self.config.micro_bsz

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, ...]:
        if not 0 <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)} (epoch_steps * micro_bsz)")
        c, epoch = self.config, self.real_epoch
        place = self.sampler.place(epoch, idx)
        if c.data_type == "uint16":
            return self._tensors(self.source, place.start * c.my_sample_len, c.my_sample_len)
        source = self.mixing if place.mixed else self.source
        x, y = self._tensors(source, place.start, c.ctx_len + 1)
        if c.my_qa_mask != 1:
            return x, y
        mask = torch.ones(c.ctx_len) if place.mixed else answer_mask(x, c.qa_mask_ids)
        if not mask.any():  # no answer in this window: general text in its place, as in the official trainer
            x, y = self._tensors(self.mixing, self.sampler.mixing_place(epoch, idx).start, c.ctx_len + 1)
            mask = torch.ones(c.ctx_len)
        return x, y, mask

    def describe(self) -> str:
        """A report to print before training: size, slots, what share of the data will be read, notes."""
        c, s = self.config, self.source
        lines = [f"{c.data_type} {s.path}: {s.n_tokens} {s.what}, vocab_size {self.vocab_size}"]
        each = f"{c.epoch_steps} steps x {c.micro_bsz} samples x {self.world_size} ranks"
        lines.append(f"one mini-epoch = {each} = {self.samples_per_epoch} samples, now number {self.real_epoch}")
        if c.data_type == "uint16":
            lines.append(f"places: random, {self.sampler.n_starts} rows of {c.my_sample_len} tokens")
        elif self.sampler.walks:
            p, slots, share = c.magic_prime, s.n_tokens // c.ctx_len, c.magic_prime * c.ctx_len / s.n_tokens
            lines.append(f"places: magic prime {p} of {slots} slots of {c.ctx_len} tokens; one pass reads {share:.2%} "
                         f"of the tokens in {p / self.samples_per_epoch:.2f} mini-epochs")
        else:
            lines.append(f"places: random, {self.sampler.n_starts} possible starts; no pass over the whole is promised")
        if self.held_out is not None:
            lines.append(f"held out: the last {self.held_out.n_tokens} {s.what}, "
                         f"{(self.held_out.n_tokens - 1) // c.ctx_len} windows that training never reads")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def _make_sampler(self, seed: int) -> StartSampler:
        c, source, mixing = self.config, self.source, self.mixing
        n_starts, shift = source.n_starts(c.ctx_len), max(c.my_pile_shift, 0)
        sampler = StartSampler(c.ctx_len, n_starts, self.samples_per_epoch, self.rank, self.world_size, seed,
                               stage=0 if c.data_type == "uint16" else c.my_pile_stage,  # rows are always random
                               prime=c.magic_prime, shift=shift, random_steps=c.my_random_steps, qa_mask=c.my_qa_mask,
                               n_mix_starts=mixing.n_starts(c.ctx_len) if mixing else 0)
        if sampler.walks:
            try:
                self.notes += check_prime(c.magic_prime, source.n_tokens, n_starts, c.ctx_len, shift,
                                          self.samples_per_epoch)
            except ValueError as error:
                if self.held_out is None:
                    raise
                raise ValueError(f"{error}; val_split {c.val_split} leaves {source.n_tokens} tokens for training and "
                                 f"holds out the last {self.held_out.n_tokens}") from None
        elif source.n_tokens < 3 * c.ctx_len:
            self.notes.append(f"{source.n_tokens} {source.what} are fewer than 3 * ctx_len = {3 * c.ctx_len}: nearly "
                              "every window is the same text; use a smaller ctx_len or more data")
        return sampler

    def _check_tokenizer(self, reader: object) -> None:
        if reader is None and self.vocab_size == tokenizer.WorldTokenizer.vocab_size:
            reader = tokenizer.WorldTokenizer  # its class knows name and sha256
        for source in (self.source, self.mixing):
            meta = getattr(source, "meta", None)
            if reader is not None and meta is not None:
                source.check_tokenizer(reader.name, reader.sha256)
            if meta is not None and (meta.get("vocab_size") or 0) > self.vocab_size:
                raise ValueError(f"vocab_size is {self.vocab_size}, but {source.path} was made by "
                                 f"{meta['tokenizer']!r} with {meta['vocab_size']} tokens; use --vocab_size "
                                 f"{meta['vocab_size']}")

    def _check_some_windows(self) -> None:
        """Read a few samples now, so that wrong token ids show before training and not in its middle."""
        for idx in np.unique(np.linspace(0, len(self) - 1, 8).astype(int)):
            self[int(idx)]

    def _tensors(self, source: sources.Source, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = source.window(start, length)  # (length,) int64
        low, high = int(window.min()), int(window.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"{source.path}: token id {bad} in the window at {start}, but vocab_size is "
                             f"{self.vocab_size} (ids 0 to {self.vocab_size - 1}); were the data made by the tokenizer "
                             "of this model, and is --vocab_size its size?")
        tokens = torch.from_numpy(window)
        return tokens[:-1], tokens[1:].clone()  # y with its own memory: pinning and sharing stay independent


def answer_mask(x: torch.Tensor, begin: tuple[int, ...] = (187, 187, 34, 27)) -> torch.Tensor:
    """1.0 where the target belongs to an answer: from the last token of `begin` up to the next token 0. (T,) float32.

    The loss is sum(cross entropy * mask) / sum(mask). Float32, because bfloat16 (the official dtype) sums up to 256.
    """
    mask, inside, ids = torch.zeros(len(x)), False, x.tolist()
    for i in range(len(begin) - 1, len(ids)):
        if tuple(ids[i - len(begin) + 1:i + 1]) == tuple(begin):
            inside = True
        if ids[i] == 0:
            inside = False
        mask[i] = float(inside)
    return mask
