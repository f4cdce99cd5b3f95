"""What a run will meet on this machine, looked at before it starts: data, weights, folder, devices, packages.

It is: `examine`, which lists everything that would stop the run later, each with flag, value and remedy, and fills in
what the data alone can tell (the magic prime, the size of a character vocabulary). It is not: the rules that flags
obey among themselves (rules.py). Reads files with numpy, imports no torch, writes nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv_nb.data import sources
from rwkv_nb.data.held_out import split
from rwkv_nb.data.magic_prime import explain
from rwkv_nb.data.sampler import check_prime
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.training.compiling import why_not
from rwkv_nb.training.config import DATA_TYPES, MINI_EPOCH

if TYPE_CHECKING:
    from rwkv_nb.training.config import TrainConfig

COMMAND = "python -m rwkv_nb"
SCANNED = 1 << 24  # so many tokens are looked at for ids outside of the vocabulary; all of them in smaller data
ALONE = ("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2")  # on one device they have nothing to divide


@dataclass
class Findings:
    """What `examine` found. changes: flags to set, with what the data or the machine says."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, int | str] = field(default_factory=dict)


def examine(cfg: TrainConfig) -> Findings:
    """Every problem of a run of `cfg` on this machine; a wrong `cfg` is examined as far as it makes sense."""
    found = Findings()
    if cfg.data_type in DATA_TYPES and cfg.ctx_len > 0 and cfg.my_pile_version in (1, 2):
        _data(cfg, found)
    found.problems += [*_weights(cfg), *_folder(cfg), *_packages(cfg)]
    if cfg.my_pile_stage != 1:  # weights are built on the processor, by one process
        _devices(cfg, found)
    return found


def _data(cfg: TrainConfig, found: Findings) -> None:
    if missing := _missing_data(cfg):
        found.problems.append(missing)
        return
    try:
        source = sources.open_source(cfg)
        n_starts = source.n_starts(cfg.ctx_len)
    except (ValueError, OSError) as error:
        found.problems.append(f"data_file={cfg.data_file!r} (ctx_len={cfg.ctx_len}): {error}")
        return
    found.problems += _vocabulary(cfg, source)
    if cfg.data_type in sources.TEXT_TYPES and not found.problems:
        found.changes["vocab_size"] = max(cfg.vocab_size, source.tokenizer.vocab_size)
    if 0 < cfg.val_split < 1:
        try:
            source, _ = split(source, cfg.ctx_len, cfg.val_split)
            n_starts = source.n_starts(cfg.ctx_len)
        except ValueError as error:
            found.problems.append(f"val_split={cfg.val_split}: {error}")
            return
    if cfg.my_pile_stage not in (1, 2, 3):
        return
    best = explain(source.n_tokens, cfg.ctx_len)
    if cfg.magic_prime > 0:
        try:
            check_prime(cfg.magic_prime, source.n_tokens, n_starts, cfg.ctx_len, max(0, cfg.my_pile_shift), MINI_EPOCH)
        except ValueError as error:
            found.problems.append(f"magic_prime={cfg.magic_prime}: {error}")
    elif best.prime is None:
        found.problems.append(f"magic_prime=0: none exists for ctx_len={cfg.ctx_len}: {best.reason}")
    else:
        found.changes["magic_prime"] = best.prime
        found.notes.append(f"magic_prime: {best.prime}, computed from {source.n_tokens} {source.what}")


def _missing_data(cfg: TrainConfig) -> str:
    """The problem with `data_file` as a name, with the command that makes the file; "" if it is there."""
    name = cfg.data_file
    if cfg.data_type == "dummy":
        return ""
    if not name:
        return f"data_file='': name the data (data_type={cfg.data_type!r}); data/demo with data_type=binidx is here"
    if cfg.data_type != "binidx" or cfg.my_pile_version == 2:
        return "" if os.path.isfile(name) else f"data_file={name!r}: no such file; the current folder is {os.getcwd()}"
    if name.endswith((".bin", ".idx")):
        return f"data_file={name!r}: give the name that .bin and .idx share, {name[:-4]}"
    absent = [name + part for part in (".bin", ".idx") if not os.path.isfile(name + part)]
    if not absent:
        return ""
    if os.path.isfile(name):
        return f"data_file={name!r}: a single file, but data_type=binidx; {_make_data(name, Path(name).stem, cfg)}"
    remedy = _make_data("IN.jsonl", name, cfg)
    if os.path.basename(name) == "minipile":
        folder = os.path.dirname(name) or "."
        remedy = f"download it: {COMMAND} download minipile" + (f" --to {folder}" if folder != "data" else "")
    elif os.path.isfile(name + ".jsonl"):
        is_demo = os.path.basename(name) == "demo"
        remedy = f"build it: {COMMAND} build_data" if is_demo else _make_data(name + ".jsonl", name, cfg)
    return f"data_file={name!r}: {' and '.join(absent)} missing; {remedy}"


def _make_data(jsonl: str, prefix: str, cfg: TrainConfig) -> str:
    return f"make it from text: {COMMAND} make_data {jsonl} 1 {cfg.ctx_len} --out {prefix}"


def _vocabulary(cfg: TrainConfig, source: sources.Source) -> Iterator[str]:
    if cfg.data_type in sources.TEXT_TYPES:
        size = source.tokenizer.vocab_size
        if 0 < cfg.vocab_size < size:
            yield f"vocab_size={cfg.vocab_size}: the text has {size} different characters; use {size}, or 0 to count"
        return
    meta = getattr(source, "meta", None) or {}
    says = meta.get("vocab_size") or 0
    if cfg.vocab_size == 0:
        yield (f"vocab_size=0: only text is counted by itself; use {says}, as {meta['tokenizer']} made the data" if says
               else "vocab_size=0: only text is counted by itself; use the tokenizer's size, 65536 for World")
        return
    if says > cfg.vocab_size:
        yield f"vocab_size={cfg.vocab_size}: {meta['tokenizer']} made the data, with {says} tokens; use {says}"
        return
    if cfg.vocab_size == WorldTokenizer.vocab_size and hasattr(source, "check_tokenizer"):
        try:
            source.check_tokenizer(WorldTokenizer.name, WorldTokenizer.sha256)
        except ValueError as error:
            yield f"vocab_size={cfg.vocab_size}: {error}"
            return
    if isinstance(source, sources.Mixture):
        return  # its parts are many and large; the first windows are read before training
    highest = _highest(source.tokens)
    if highest >= cfg.vocab_size:
        yield (f"vocab_size={cfg.vocab_size}: the data holds token {highest}; it was made by another tokenizer, or the "
               f"size must be at least {highest + 1}")


def _highest(tokens: np.ndarray) -> int:
    """The highest of at most SCANNED tokens, from sixteen places of the data."""
    if tokens.size <= SCANNED:
        return int(tokens.max())
    length = SCANNED // 16
    starts = np.linspace(0, tokens.size - length, 16).astype(np.int64)
    return max(int(tokens[start : start + length].max()) for start in starts)


def _weights(cfg: TrainConfig) -> Iterator[str]:
    if cfg.load_model not in ("", "0"):
        if not os.path.isfile(cfg.load_model):
            yield f"load_model={cfg.load_model!r}: no such file; name a .pth file, or leave it empty"
    elif cfg.my_pile_stage >= 2:
        folder = Path(cfg.proj_dir)
        names = os.listdir(folder) if folder.is_dir() else []
        if not any(re.fullmatch(r"rwkv-((init|\d+)\.pth|\d+(\.\d+)?\.state)", name) for name in names):
            yield (f"proj_dir={cfg.proj_dir!r}: no rwkv-init.pth or rwkv-N.pth to start from (my_pile_stage="
                   f"{cfg.my_pile_stage}); make the first with the same flags and --my_pile_stage 1, or put a model "
                   "there under the name rwkv-init.pth")


def _folder(cfg: TrainConfig) -> Iterator[str]:
    folder = Path(cfg.proj_dir).absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        yield f"proj_dir={cfg.proj_dir[:100]!r}: {error.strerror}; name another folder"
        return
    if not existing.is_dir():
        yield f"proj_dir={cfg.proj_dir!r}: {existing} is a file; name another folder"
    elif not os.access(existing, os.W_OK):
        yield f"proj_dir={cfg.proj_dir!r}: {existing} may not be written to; name another folder"


def _packages(cfg: TrainConfig) -> Iterator[str]:
    if cfg.wandb and not installed("wandb"):
        yield f"wandb={cfg.wandb!r}: the package wandb is not installed; pip install -e '.[gpu]', or leave it empty"
    if cfg.logger == "tensorboard" and not (installed("tensorboard") or installed("tensorboardX")):
        yield ("logger='tensorboard': the package tensorboard is not installed; pip install -e '.[gpu]', or "
               "--logger csv")


def _devices(cfg: TrainConfig, found: Findings) -> None:
    gpus = visible_gpus()
    if cfg.compile == 1 and (reason := why_not(cfg.accelerator == "cpu" or gpus == 0)):
        found.problems.append(f"compile=1: {reason}; install it, or use --compile 0")
    if cfg.accelerator in ("gpu", "cuda") and gpus == 0:
        found.problems.append(f"accelerator={cfg.accelerator!r}: no GPU is visible here; use --accelerator cpu, or "
                              "auto to take what there is")
    elif cfg.accelerator in ("gpu", "cuda") and gpus is not None and cfg.devices > gpus:
        found.problems.append(f"devices={cfg.devices}: {gpus} GPU(s) visible here; use at most so many")
    if cfg.accelerator == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        found.problems.append("accelerator='mps': that is the GPU of an Apple processor, and here is none; use "
                              "--accelerator cpu, or auto to take what there is")
    if not cfg.strategy.startswith("deepspeed"):
        return
    on_cpu = cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and gpus == 0)
    alone = cfg.devices * cfg.num_nodes == 1
    if alone and (on_cpu or (cfg.strategy in ALONE and not installed("deepspeed"))):
        why = "DeepSpeed needs GPUs" if on_cpu else "DeepSpeed is not installed and one device has nothing to divide"
        found.changes["strategy"] = "auto"
        found.notes.append(f"strategy: auto in place of {cfg.strategy}, the same training: {why}")
    elif on_cpu:
        if cfg.accelerator == "auto":  # with "cpu" the flags alone tell
            found.problems.append(f"strategy={cfg.strategy!r}: needs GPUs; on processors use --strategy ddp")
    elif not installed("deepspeed"):
        instead = "fsdp" if "stage_3" in cfg.strategy else "ddp"
        found.problems.append(f"strategy={cfg.strategy!r}: the package deepspeed is not installed; "
                              f"pip install -e '.[gpu]', or use --strategy {instead}")


def installed(package: str) -> str:
    """The version of an installed package, "" if it is not. Imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def visible_gpus() -> int | None:
    """How many GPUs a process here may use, as the driver says; None if that cannot be told without torch."""
    if platform.system() == "Darwin":
        return 1 if platform.machine() == "arm64" else 0
    if os.path.exists("/dev/kfd"):
        return None  # AMD's: left to torch
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        count = ctypes.c_uint()
        if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return 0
    except OSError:
        return 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count.value if chosen is None else min(count.value, len([n for n in chosen.split(",") if n.strip()]))
