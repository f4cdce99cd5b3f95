"""Pairs and windows whose truth is plain, shared by the tests of the training data set."""

from __future__ import annotations

import math

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.dataset import TokenDataset

CTX = 8


def write_pair(prefix, tokens, tokenizer=None) -> str:
    with MMapIndexedDatasetBuilder(str(prefix), tokenizer=tokenizer) as builder:
        builder.add_item(tokens)
        builder.end_document()
    return str(prefix)


def pair_data(prefix, **more) -> TokenDataset:
    flags = {"data_file": prefix, "data_type": "binidx", "vocab_size": 1000, "ctx_len": CTX, "epoch_steps": 5,
             "micro_bsz": 4, "my_pile_stage": 3, "magic_prime": 113}
    names = ("rank", "world_size", "seed", "tokenizer")
    return TokenDataset(**{n: more.pop(n) for n in names if n in more}, **{**flags, **more})


def starts(data: TokenDataset) -> list[int]:
    return [int(data[i][0][0]) for i in range(len(data))]


def official_starts(n, p, ctx, epoch=0, rank=0, world=1, per_epoch=20, shift=0, skip=0) -> list[int]:
    factor = int(p * ((math.sqrt(5) - 1) / 2))
    iis = [1 + epoch * per_epoch + i * world + rank - skip for i in range(n)]
    return [factor * ii * ii * ii % p * ctx + shift for ii in iis]
