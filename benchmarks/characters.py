"""What a few minutes of training buy: bits a character on held-out standard-library text, over several seeds.

    python benchmarks/characters.py                              180 s each, seeds 0, 1, 2, the quicker number format
    python benchmarks/characters.py --seconds 60 --seeds 0       one short run
    python benchmarks/characters.py --steps 2500 --precision fp32    by steps: repeatable on a busy machine

The run is that of notebook 07: the same flags, the same text, the same end. Every seed gives other initial weights and
windows that begin elsewhere. Training time does not count drawing or judging; the learning rate ends with the time, for
which the speed is measured first. What it is not: a comparison of architectures; the text is that of the Python that
runs this, so bits differ a little from one Python to another.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from math import log
from pathlib import Path

import torch

from rwkv_nb.data import corpus, magic_prime
from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.machine import choose_threads
from rwkv_nb.training.trainer import Monitor, evaluate, fast_bf16, measure_tokens_per_second, train

FLAGS = {
    "data_type": "binidx", "vocab_size": 96, "ctx_len": 128, "n_layer": 3, "n_embd": 128, "micro_bsz": 16,
    "my_pile_stage": 3, "lr_init": 6e-3, "lr_final": 4e-4, "warmup_steps": 10, "accelerator": "cpu",
}  # fmt: skip


def write_data(prefix: Path, text: str) -> int:
    """Write the text as a binidx pair; returns its number of tokens."""
    tokenizer, total = CharTokenizer(corpus.ALPHABET), 0
    with MMapIndexedDatasetBuilder(prefix, tokenizer=tokenizer) as builder:
        for document in text.split(corpus.DOCUMENT_BREAK):
            ids = tokenizer.encode(document) + [0]
            builder.add_item(ids)
            builder.end_document()
            total += len(ids)
    return total


def quickest(cfg: TrainConfig, precision: str) -> tuple[TrainConfig, float]:
    """The flags with the number format that is quicker here, and tokens a second with the better number of threads."""
    formats = [precision] if precision != "auto" else ["fp32", "bf16"] if fast_bf16() else ["fp32"]
    model, dataset = new_model(cfg, 0), TokenDataset(DataConfig.from_flags(cfg))

    def speed(c: TrainConfig) -> float:
        return measure_tokens_per_second(c, model, dataset, steps=10)

    cfg = max((cfg.replace(precision=p) for p in formats), key=speed)
    return cfg, choose_threads(lambda: speed(cfg))


def new_model(cfg: TrainConfig, seed: int) -> RWKV:
    config = cfg.model_config()
    return RWKV(config, init_weights(config, seed=seed, lr_init=cfg.lr_init))


def run(cfg: TrainConfig, seed: int, held_out: torch.Tensor, max_seconds: float | None) -> tuple[float, Monitor]:
    """Train one model; bits a character on all of the held-out text, and the monitor with time and steps."""
    monitor = Monitor(every_seconds=None, every_steps=100)
    shifted = cfg.replace(my_pile_shift=17 * seed % cfg.ctx_len)  # the walk is the same, the cuts are not
    dataset = TokenDataset(DataConfig.from_flags(shifted), seed=seed)
    model = train(cfg.replace(random_seed=seed), new_model(cfg, seed), dataset, [monitor], max_seconds, progress=False)
    return evaluate(model, held_out, cfg.ctx_len) / log(2), monitor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="training time of each run")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps instead, however long they take")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    for name in ("lr_init", "lr_final"):
        parser.add_argument(f"--{name}", type=float, default=FLAGS[name])
    for name in ("micro_bsz", "ctx_len", "n_layer", "n_embd"):
        parser.add_argument(f"--{name}", type=int, default=FLAGS[name])
    args = parser.parse_args()
    flags = FLAGS | {name: getattr(args, name) for name in FLAGS if hasattr(args, name) and name != "precision"}

    train_text, held_out = corpus.split(corpus.standard_library_text("sources"), validation=0.05)
    held = torch.from_numpy(corpus.characters_to_ids(held_out).astype("int64"))
    with tempfile.TemporaryDirectory() as folder:
        n_tokens = write_data(Path(folder) / "library", train_text)
        prime = magic_prime.magic_prime(n_tokens, flags["ctx_len"])
        cfg = TrainConfig(proj_dir=folder, data_file=f"{folder}/library", magic_prime=prime, **flags)
        cfg, speed = quickest(cfg, args.precision)
        tokens = args.steps * cfg.tokens_per_step or int(args.seconds * speed)
        cfg = cfg.replace(my_exit_tokens=tokens)
        size = sum(p.numel() for p in new_model(cfg, 0).parameters())
        print(f"L{cfg.n_layer} D{cfg.n_embd} ({size:,} parameters), ctx_len {cfg.ctx_len}, micro_bsz {cfg.micro_bsz}, "
              f"lr {cfg.lr_init} to {cfg.lr_final}, {cfg.precision}, {torch.get_num_threads()} threads; measured "
              f"{speed:,.0f} characters/s; {len(train_text):,} characters to learn from, {len(held_out):,} held out\n")
        print("| seed | steps | characters | seconds | characters/s | held-out bits a character |")
        print("|--:|--:|--:|--:|--:|--:|")
        bits = []
        for seed in args.seeds:
            result, monitor = run(cfg, seed, held, None if args.steps else 1.1 * args.seconds)
            last = monitor.records[-1]
            bits.append(result)
            print(f"| {seed} | {last.step:,} | {last.tokens:,} | {last.seconds:.1f} "
                  f"| {last.tokens / last.seconds:,.0f} | {result:.3f} |", flush=True)
        low, high = min(bits), max(bits)
        print(f"\nmean {statistics.mean(bits):.3f}, lowest {low:.3f}, highest {high:.3f}, spread {high - low:.3f}")


if __name__ == "__main__":
    main()
