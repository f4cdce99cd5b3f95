"""What people type: the flags of train, generate and make_data."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import torch

from rwkv_nb import __main__ as door
from rwkv_nb.data import make_data as converter
from rwkv_nb.data import tokenizer as tokenizers
from rwkv_nb.data.binidx import MMapIndexedDataset, MMapIndexedDatasetBuilder
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.training import cli
from rwkv_nb.training.config import ConfigError

from . import Wrong, demand

NUMBERS = (
    "0", "1", "2", "-1", "3", "7", "8", "16", "32", "64", "96", "1e3", "1.5", "-0.5", "0.1", "1e-5", "nan", "inf",
    "-inf", "1e400", "10**3", "", " ", "x", "0x10", "1_000", "٣", "99999999999999999999", "-99999999999999999999",
    "9" * 5000, "True", "None", "2147483648", "1,5", "+4", "1e30",
)  # fmt: skip
OTHERS = (
    "", " ", "cpu", "gpu", "fp32", "nowhere", "/dev/null", "binidx", "utf-8", "\0", "a\nb", "é", "\udc80", "-", "--",
    "x" * 300, "no/such/file", "%s", "{}", "..", "/", "~", "[1]", "True",
)  # fmt: skip


def spoken(argv: list[str], stdin: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run here through the one door."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = door.main(argv)
            except SystemExit as stop:  # argparse
                code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue()


def complaint(code: int, err: str, changed: list[str]) -> str:
    """ "refused", for a message without traceback that names a flag or a value that was typed."""
    demand(code in (1, 2), f"exit code {code}")
    demand("Traceback" not in err and len(err.split()) >= 4, f"no message: {err[-300:]!r}")
    said = err.replace("-", "_")
    named = [word for word in changed if word.strip("-").replace("-", "_") in said]
    demand(named or not changed, f"the message names none of {changed!r}: {err[-300:]!r}")
    return "refused"


def some_flags(draw: Random, good: dict[str, str], names: list[str], most: int = 3) -> tuple[dict[str, str], list[str]]:
    """Flags, some with values drawn from all sorts; and the words that a message may name."""
    flags, changed = dict(good), []
    for _ in range(draw.choice([0, *range(1, most + 1)])):
        name = draw.choice(names)
        value = draw.choice(NUMBERS if draw.random() < 0.75 else OTHERS)
        if draw.random() < 0.03:
            name = draw.choice((name[:-1], name.upper(), name + "s", "no_such_flag"))
        flags[name] = value
        changed += [name, value] if value.strip() else [name]
    return flags, changed


def as_words(draw: Random, flags: dict[str, str]) -> list[str]:
    return [
        word
        for n, v in flags.items()
        for word in ([f"--{n}={v}"] if draw.random() < 0.2 or v[:1] == "-" else [f"--{n}", v])
    ]


def train(folder: Path) -> Callable[[Random], str]:
    """Refused before anything is written, with all mistakes named; or accepted, and then a short run ends well."""
    (folder / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
    with MMapIndexedDatasetBuilder(folder / "pair") as builder:
        builder.add_item(np.arange(900, dtype=np.uint16) % 50)
        builder.end_document()
    good = {
        "proj_dir": str(folder / "run"),
        "data_file": str(folder / "text.txt"),
        "accelerator": "cpu",
        "precision": "fp32",
        "n_layer": "2",
        "n_embd": "32",
        "head_size_a": "32",
        "ctx_len": "8",
        "micro_bsz": "2",
        "epoch_steps": "2",
        "epoch_count": "1",
        "my_exit_tokens": "16",
        "enable_progress_bar": "False",
        "save_state": "False",
    }
    binidx = {**good, "data_type": "binidx", "data_file": str(folder / "pair"), "vocab_size": "50"}
    names = list(cli.FIELDS)
    real = [0]

    def bounded(cfg) -> bool:
        """Small enough to be run here."""
        sizes = (
            cfg.n_layer,
            cfg.n_embd,
            cfg.dim_att,
            cfg.dim_ffn,
            cfg.ctx_len,
            cfg.micro_bsz,
            cfg.vocab_size,
            cfg.epoch_steps,
            cfg.head_qk,
            cfg.tiny_att_dim,
            cfg.my_random_steps,
            cfg.accumulate_grad_batches,
            cfg.devices * cfg.num_nodes * 128,
        )
        return (
            max(sizes) <= 128
            and cfg.accelerator == "cpu"
            and cfg.strategy == "auto"
            and not cfg.wandb
            and cfg.my_pile_stage == 0
            and 0 < abs(cfg.my_exit_tokens) <= 1000
            and cfg.epoch_begin == 0
        )

    def case(draw: Random) -> str:
        flags, changed = some_flags(draw, draw.choice((good, good, binidx)), names)
        argv = as_words(draw, flags)
        before = sorted(folder.rglob("*"))
        try:
            cfg, _ = cli.check(argv)
        except ConfigError as error:
            code, out, err = spoken(["train", *argv])
            demand(code == 2 and not out, f"{argv}: exit code {code} for {error}")
            demand(sorted(folder.rglob("*")) == before, f"{argv}: something was written")
            return complaint(code, err, changed)
        numbers = [value for value in cfg.flags().values() if isinstance(value, float)]
        demand(all(map(math.isfinite, numbers)), f"{argv}: accepted, with a number that is none")
        if draw.random() < 0.02 and bounded(cfg):
            real[0] += 1
            argv = as_words(draw, {**flags, "proj_dir": str(folder / f"run{real[0]}")})
            code, out, err = spoken(["train", *argv])
            if code:
                raise Wrong(f"{argv}: accepted, then {err[-800:]}")
            demand("written:" in out, f"{argv}: {out}")
        return "right"

    return case


def generate(folder: Path) -> Callable[[Random], str]:
    """Text that begins with the prompt, or a message that names the flag."""
    config = ModelConfig(2, 32, 26, head_size_a=32)
    torch.save(init_weights(config, seed=0), folder / "rwkv-final.pth")
    CharTokenizer("abcdefghijklmnopqrstuvwxyz").save(folder / "vocab.json")
    good = {"model": str(folder / "rwkv-final.pth"), "prompt": "eagle", "n_tokens": "3", "seed": "1"}
    names = [
        "model",
        "strategy",
        "engine",
        "tokenizer",
        "prompt",
        "n_tokens",
        "temperature",
        "top_p",
        "top_k",
        "alpha_frequency",
        "alpha_presence",
        "alpha_decay",
        "token_ban",
        "token_stop",
        "stop",
        "chunk_len",
        "seed",
    ]

    spoken(["generate", *(f"--{name}={value}" for name, value in good.items())])  # builds the kernels, if need be

    def case(draw: Random) -> str:
        flags, changed = some_flags(draw, good, names, 2)
        if not re.fullmatch(r"\d{1,2}", flags["n_tokens"]) and draw.random() < 0.9:
            flags["n_tokens"] = "3"
        argv = ["generate", *as_words(draw, flags)]
        if flags["n_tokens"].strip("+").isdecimal() and len(flags["n_tokens"]) > 3:
            return "right"  # so many tokens are a right that takes too long here
        code, out, err = spoken(argv, stdin="fed by a pipe")
        if code:
            others = {"prompt": "text: character", "tokenizer": "vocab.json"}  # in the words of the tokenizer
            return complaint(code, err, changed + [others[name] for name in others if name in changed])
        demand(out.startswith(flags["prompt"]), f"{argv}: {out!r}")
        return "right"

    return case


def make_data(folder: Path) -> Callable[[Random], str]:
    """A pair that can be read, or a message; a pair that was there stays."""
    source = folder / "in.jsonl"
    source.write_text('{"text": "the eagle"}\n{"text": "cell by cell"}\n')
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "the eagle"}\n{"txt": "cell by cell"}\n')
    cached = tokenizers.WorldTokenizer()  # loaded once: a quarter of a second

    def case(draw: Random) -> str:
        places = [str(draw.choice((source, source, source, bad))), "1", "4"]
        flags = {"out": str(folder / "out"), "seed": "1"}
        changed = []
        for _ in range(draw.choice((0, 1, 1, 2))):
            value = draw.choice(NUMBERS if draw.random() < 0.7 else OTHERS)
            if draw.random() < 0.4:
                at = draw.randrange(3)
                places[at] = value
                changed += ["epochs", value, ("jsonl", "n_epoch", "ctx_len")[at]]
                changed.append(("IN.jsonl", "N_EPOCH", "CTX_LEN")[at])
            else:
                name = draw.choice(("out", "seed", "on-error", "on-error", "no-such"))
                flags[name] = draw.choice((value, "skip", "stop")) if name == "on-error" else value
                changed += [name, value, f"output {value}"]
        prefix = Path(folder, flags["out"]) if flags["out"].strip("\0") == flags["out"] else None
        before = (folder / "out.bin").read_bytes() if (folder / "out.bin").exists() else None
        loaded = mock.patch.object(converter, "WorldTokenizer", lambda: cached)
        with contextlib.chdir(folder), loaded:
            code, out, err = spoken(["make_data", *as_words(draw, flags), *places])
        if code:
            after = (folder / "out.bin").read_bytes() if (folder / "out.bin").exists() else None
            demand(after == before, f"{places} {flags}: refused, and the pair is another one")
            return complaint(code, err, [w for w in changed if w.strip()] + [places[0]])
        with MMapIndexedDataset(prefix) as data:
            demand(len(data) and f"{data.n_tokens} tokens" in out, f"{places} {flags}: {out}")
        if prefix != folder / "out":
            for part in (".bin", ".idx", ".meta.json"):
                Path(f"{prefix}{part}").unlink()
        return "right"

    return case
