"""Writing and reading a prompt on a processor: ours against the `rwkv` package, all in one run.

    python benchmarks/decode.py                        L12 D768 V65536; two minutes on two cores, 5 GB
    python benchmarks/decode.py --n_layer 4 --n_embd 256 --vocab_size 1000 --turns 2
    python benchmarks/decode.py --only perplexity      what rounding weights costs: data/small.pth, or --model FILE

Random weights for the speed: the arithmetic does not depend on their values. Jobs take turns and the best of the turns
counts, as in benchmarks/wkv.py. The package runs with RWKV_JIT_ON=1 and the threads of torch.

The limit is what reading all weights once takes at the speed at which this machine reads memory, the sum of 256 MB in
large pages. That speed can double from one second to the next, so step and sum take turns, and the median ratio counts.

Perplexity is that of a trained model, a character, on text that it has not seen: half stories of another seed than
those that it learnt from, half documentation that was held out.

What it is not: a measure of a model's quality, or of the choice of a token, which is timed beside it (`Row.draw`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from wkv import print_table, seconds, take_turns

from rwkv_nb.data import corpus, stories
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.inference.buffers import Pages
from rwkv_nb.inference.decoder import Decoder
from rwkv_nb.inference.engine import tokenizer_for
from rwkv_nb.inference.packing import STORAGES
from rwkv_nb.inference.row import Row
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV

PACKAGE = ("cpu fp32", "cpu bf16", "cpu fp16", "cpu fp32i8")
TOO_SLOW = ("cpu fp32i8",)  # a prompt takes it half a minute
PROMPT, ROWS = 256, 8
SMALL = Path(__file__).parents[1] / "data" / "small.pth"
CHARACTERS = 16384  # of each of two texts
HELD_OUT_SEED = 1  # of stories; scripts/make_small_checkpoint.py learns from those of seed 0
Jobs = dict[str, Callable[[], object]]


def package_jobs(path: Path, ids: list[int]) -> Jobs:
    """"package STRATEGY step" and "... prompt" for each strategy."""
    from rwkv.model import RWKV as Package

    jobs: Jobs = {}
    for strategy in PACKAGE:
        with contextlib.redirect_stdout(io.StringIO()):
            model = Package(str(path).removesuffix(".pth"), strategy, verbose=False)
        _, state = model.forward(ids[:5], None)
        jobs[f"package {strategy} step"] = lambda model=model, state=state: model.forward([ids[0]], list(state))
        if strategy not in TOO_SLOW:
            jobs[f"package {strategy} prompt"] = lambda model=model: model.forward(ids, None)
    return jobs


def our_jobs(model: RWKV, ids: list[int]) -> Jobs:
    """"ours STORAGE step", "... step of 8" and "... prompt"."""
    jobs: Jobs = {}
    prompt = torch.tensor([ids])
    for storage in STORAGES:
        for products in ("float32", "bfloat16"):
            decoder = Decoder(model, storage, products)
            name = f"ours {storage}, {products} products prompt"
            jobs[name] = lambda d=decoder: d(prompt, None, full_output=False)
        for rows, name in ((1, "step"), (ROWS, f"step of {ROWS}")):
            one, state = torch.full((rows,), ids[0]), decoder.new_state(rows)
            jobs[f"ours {storage} {name}"] = lambda d=decoder, one=one, state=state: d.step(one, state)
    return jobs


def draw_job(vocab_size: int) -> Callable[[], object]:
    """A draw with the default settings, penalties included; the 500 likeliest tokens hold most of the probability."""
    tokenizer = WorldTokenizer()
    row = Row(tokenizer, vocab_size, 1 << 30, SamplingArgs(), generator=torch.Generator().manual_seed(0))
    logits = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    return lambda: row.draw(logits)


def speed(config: ModelConfig, turns: int) -> None:
    weights = {name: x.bfloat16() for name, x in init_weights(config, seed=0).items()}
    ids = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    model = RWKV(config, {name: x.float() for name, x in weights.items()}).eval().requires_grad_(False)
    jobs = our_jobs(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(weights, path)
        jobs |= package_jobs(path, ids)
    if config.vocab_size == 65536:
        jobs["draw"] = draw_job(config.vocab_size)
    best = take_turns(jobs, turns)
    print(f"L{config.n_layer} D{config.n_embd} V{config.vocab_size}, {torch.get_num_threads()} threads; "
          f"float32 products reach {2 * 2048**3 / best['matmul'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    if "draw" in best:
        print(f"Choosing a token from {config.vocab_size} logits takes {1e3 * best['draw']:.1f} ms; "
              "it is in none of the figures.")  # fmt: skip

    step, prompt = best["package cpu fp32 step"], best["package cpu fp32 prompt"]
    rows = []
    for name in (f"package {strategy}" for strategy in PACKAGE):
        rows.append([name, f"{1 / best[f'{name} step']:.1f}", f"{step / best[f'{name} step']:.2f}", "-", "-"])
    for storage in STORAGES:
        took, eight = best[f"ours {storage} step"], best[f"ours {storage} step of {ROWS}"]
        rows.append([f"ours {storage}", f"{1 / took:.1f}", f"{step / took:.2f}", f"{ROWS / eight:.0f}",
                     f"{ROWS * took / eight:.1f}"])  # fmt: skip
    head = ["one step", "tokens/s", "x package fp32", f"tokens/s, {ROWS} texts", "x one text"]
    print_table("Writing", head, rows)
    rows = [[name.removesuffix(" prompt"), f"{PROMPT / took:.0f}", f"{prompt / took:.2f}"]
            for name, took in best.items() if name.endswith("prompt")]  # fmt: skip
    print_table(f"A prompt of {PROMPT} tokens", ["", "tokens/s", "x package fp32"], rows)


def limit(config: ModelConfig) -> None:
    """Steps and readings of memory in turn: where its speed changes from second to second, their ratio does not."""
    block = Pages().empty((2**26,), torch.float32).fill_(1)
    model = RWKV(config, init_weights(config, seed=0)).eval().requires_grad_(False)
    rows = []
    for storage in STORAGES:
        decoder = Decoder(model, storage)
        one, state, shares, speeds = torch.tensor([0]), decoder.new_state(), [], []
        for _ in range(80):
            read = block.nbytes / seconds(block.sum)
            speeds.append((decoder.nbytes - decoder.embedding_bytes) / seconds(decoder.step, one, state))
            shares.append(speeds[-1] / read)
        rows.append([storage, f"{median(speeds) / 1e9:.1f}", f"{median(shares):.0%}"])
    print_table("Weights read, by turns with plain reading", ["", "GB/s", "of the memory limit"], rows)


def perplexity(path: Path) -> None:
    """Of a model of characters, with each way to store and to multiply its weights."""
    model = RWKV.from_checkpoint(path).eval().requires_grad_(False)
    tokenizer = tokenizer_for(model.config, path)
    _, documentation = corpus.split(corpus.standard_library_text("docs"), validation=0.05)
    texts = [stories.generate(400, HELD_OUT_SEED)[:CHARACTERS], documentation[:CHARACTERS]]
    rows, exact = [], None
    for storage, products in [*((s, "float32") for s in STORAGES), ("bfloat16", "bfloat16"), ("int8", "bfloat16")]:
        decoder, total, n = Decoder(model, storage, products), 0.0, 0
        for text in texts:
            ids, state = torch.tensor([tokenizer.encode(text)]), None
            for start in range(0, ids.shape[1] - 1, 512):
                part = ids[:, start : start + 513]
                logits, state = decoder(part[:, :-1], state)
                total += float(torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum"))
                n += part.shape[1] - 1
        found = math.exp(total / n)
        exact = found if exact is None else exact
        rows.append([f"{storage}, {products} products", f"{found:.4f}", f"{found / exact - 1:+.3%}",
                     f"{decoder.nbytes / 2**20:.2f}"])  # fmt: skip
    head = ["weights", "perplexity a character", "against float32", "MiB"]
    print_table(f"{path.name}, {n:,} characters that it has not seen", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n_layer", 12), ("n_embd", 768), ("vocab_size", 65536), ("turns", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("speed", "limit", "perplexity"))
    parser.add_argument("--model", type=Path, default=SMALL, help="a trained model of characters, for the perplexity")
    options = parser.parse_args()
    os.environ.setdefault("RWKV_JIT_ON", "1")
    config = ModelConfig(options.n_layer, options.n_embd, options.vocab_size)
    if options.only in (None, "speed"):
        speed(config, options.turns)
    if options.only in (None, "limit"):
        limit(config)
    if options.only in (None, "perplexity"):
        perplexity(options.model)


if __name__ == "__main__":
    main()
