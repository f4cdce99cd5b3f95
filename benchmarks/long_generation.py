"""Does memory grow while a model writes? A million tokens of a tiny one, resident memory on the way.

    python benchmarks/long_generation.py                     a million tokens in C++, some ten minutes
    python benchmarks/long_generation.py --tokens 100000 --engine model

One `Generation` writes all of it from one prompt, with penalties, and its text is read as it comes. It keeps the ids
and the text that it has written, at most 40 bytes a token; the state has a fixed size. So memory may grow by that and
no more.

What it is not: a test of speed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

import psutil
import torch
from wkv import print_table

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.inference.decoder import Decoder
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
A_TOKEN = 40  # bytes that a written token may keep: an id in a list, its text
REPORTS = 10


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=("decoder", "model"), default="decoder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a model this small gains nothing from more
    config, letters = ModelConfig(2, 32, len(LETTERS), head_size_a=32), CharTokenizer(LETTERS)
    model = RWKV(config, init_weights(config, seed=0)).eval().requires_grad_(False)
    engine = Decoder(model, "float32") if options.engine == "decoder" else model
    seed = torch.Generator().manual_seed(0)
    writing = generate(engine, letters, "the ", options.tokens, SamplingArgs(), generator=seed)
    rows, begun, n = [], time.perf_counter(), 0
    first = warm = 0
    for n, _ in enumerate(writing, 1):
        if n == options.tokens // 100:
            first, warm = resident(), n  # buffers of all sizes have been used by now
        if warm and n % (options.tokens // REPORTS) == 0:
            rows.append([f"{n:,}", f"{(resident() - first) / 2**20:+.1f}", f"{time.perf_counter() - begun:.0f}"])
    grown = resident() - first
    print_table(f"{options.engine}, memory after {warm:,} tokens: {first / 2**20:.0f} MiB",
                ["tokens", "MiB more", "seconds"], rows)  # fmt: skip
    allowed = A_TOKEN * (n - warm) + 2**21
    print(f"{n:,} tokens, {n / (time.perf_counter() - begun):.0f} a second; memory grew by {grown / 2**20:.1f} MiB, of "
          f"which ids and text may be {allowed / 2**20:.1f}: {'constant' if grown <= allowed else 'IT GROWS'}")
    return grown > allowed


if __name__ == "__main__":
    sys.exit(main())
