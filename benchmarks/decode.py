"""Writing and reading a prompt on a processor: ours against the `rwkv` package, all in one run.

    python benchmarks/decode.py                        L12 D768 V65536; about two minutes on two cores, 4 GB
    python benchmarks/decode.py --n_layer 4 --n_embd 256 --vocab_size 1000 --turns 2

Random weights: the arithmetic does not depend on their values. Jobs take turns and the best of the turns counts, as in
benchmarks/wkv.py. The limit is what reading all weights once takes at the speed at which this machine reads memory (the
sum of 512 MB), measured in the same run. The package runs with RWKV_JIT_ON=1 and the threads of torch.

What it is not: a measure of quality; the loss that 8 bits cost is measured with `--perplexity FILE.pth TEXT`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from wkv import print_table, take_turns

from rwkv_nb.inference.decoder import Decoder
from rwkv_nb.inference.engine import tokenizer_for
from rwkv_nb.inference.packing import STORAGES
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV

PACKAGE = ("cpu fp32", "cpu bf16", "cpu fp16", "cpu fp32i8")
PROMPT = 256


def package_jobs(path: Path, ids: list[int]) -> dict[str, Callable[[], object]]:
    """"package STRATEGY step" and "... prompt" for each strategy."""
    from rwkv.model import RWKV as Package

    jobs: dict[str, Callable[[], object]] = {}
    for strategy in PACKAGE:
        with contextlib.redirect_stdout(io.StringIO()):
            model = Package(str(path).removesuffix(".pth"), strategy, verbose=False)
        _, state = model.forward(ids[:5], None)
        jobs[f"package {strategy} step"] = lambda model=model, state=state: model.forward([ids[0]], list(state))
        jobs[f"package {strategy} prompt"] = lambda model=model: model.forward(ids, None)
    return jobs


def our_jobs(model: RWKV, ids: list[int]) -> tuple[dict[str, Callable[[], object]], dict[str, Decoder]]:
    """"ours STORAGE step", "... step of 8" and "... prompt"; the decoders by storage."""
    jobs: dict[str, Callable[[], object]] = {}
    decoders = {}
    prompt = torch.tensor([ids])
    for storage in STORAGES:
        decoders[storage] = decoder = Decoder(model, storage)
        for rows, name in ((1, "step"), (8, "step of 8")):
            one, state = torch.full((rows,), ids[0]), decoder.new_state(rows)
            jobs[f"ours {storage} {name}"] = lambda d=decoder, one=one, state=state: d.step(one, state)
        for products in ("float32", "bfloat16"):
            reader = Decoder(model, storage, products)
            name = f"ours {storage}, {products} products prompt"
            jobs[name] = lambda r=reader: r(prompt, None, full_output=False)
    return jobs, decoders


def speed(config: ModelConfig, turns: int) -> None:
    weights = {name: x.bfloat16() for name, x in init_weights(config, seed=0).items()}
    ids = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    model = RWKV(config, {name: x.float() for name, x in weights.items()}).eval().requires_grad_(False)
    jobs, decoders = our_jobs(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save(weights, path)
        jobs |= package_jobs(path, ids)
    block = torch.ones(2**27)  # 512 MB
    jobs["read"] = block.sum
    best = take_turns(jobs, turns)
    bandwidth = block.nbytes / best["read"]
    print(f"L{config.n_layer} D{config.n_embd} V{config.vocab_size}, {torch.get_num_threads()} threads; memory is read "
          f"at {bandwidth / 1e9:.1f} GB/s, float32 products reach {2 * 2048**3 / best['matmul'] / 1e9:.0f} GFLOP/s")

    step, prompt = best["package cpu fp32 step"], best["package cpu fp32 prompt"]
    rows = []
    for name in (f"package {strategy}" for strategy in PACKAGE):
        rows.append([name, f"{1 / best[f'{name} step']:.1f}", f"{step / best[f'{name} step']:.2f}", "-", "-"])
    for storage, decoder in decoders.items():
        took, eight = best[f"ours {storage} step"], best[f"ours {storage} step of 8"]
        read = decoder.nbytes - decoder.embedding_bytes
        rows.append([f"ours {storage}", f"{1 / took:.1f}", f"{step / took:.2f}", f"{read / bandwidth / took:.0%}",
                     f"{8 * took / eight:.1f}"])  # fmt: skip
    head = ["one step", "tokens/s", "x package fp32", "of the memory limit", "8 texts at once, x one"]
    print_table("Writing", head, rows)
    rows = [[name.removesuffix(" prompt"), f"{PROMPT / took:.0f}", f"{prompt / took:.2f}"]
            for name, took in best.items() if name.endswith("prompt")]  # fmt: skip
    print_table(f"A prompt of {PROMPT} tokens", ["", "tokens/s", "x package fp32"], rows)


def perplexity(path: str, text_file: str) -> None:
    """Nats a token on a text, with each storage: what rounding costs."""
    model = RWKV.from_checkpoint(path).eval().requires_grad_(False)
    tokenizer = tokenizer_for(model.config, path)
    ids = torch.tensor([tokenizer.encode(Path(text_file).read_text(encoding="utf-8"))[: 1 << 14]])
    rows, exact = [], None
    for storage in STORAGES:
        decoder, state, total = Decoder(model, storage), None, 0.0
        for start in range(0, ids.shape[1] - 1, 512):
            part = ids[:, start : start + 513]
            logits, state = decoder(part[:, :-1], state)
            total += float(torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum"))
        nats = total / (ids.shape[1] - 1)
        exact = nats if exact is None else exact
        rows.append([storage, f"{nats:.5f}", f"{nats - exact:+.5f}", f"{decoder.nbytes / 2**20:.1f}"])
    print_table(f"{Path(path).name} on {ids.shape[1]:,} tokens", ["", "nats a token", "against float32", "MiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n_layer", 12), ("n_embd", 768), ("vocab_size", 65536), ("turns", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--perplexity", nargs=2, metavar=("FILE.pth", "TEXT"), help="what rounding the weights costs")
    options = parser.parse_args()
    if options.perplexity:
        perplexity(*options.perplexity)
        return
    os.environ.setdefault("RWKV_JIT_ON", "1")
    speed(ModelConfig(options.n_layer, options.n_embd, options.vocab_size), options.turns)


if __name__ == "__main__":
    main()
