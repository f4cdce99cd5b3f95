"""Weights to files and back: the official .pth format, and which file of a project folder is the newest.

It is: a flat dictionary of official names and tensors in one dtype, written whole or not at all, read without running
anything that a file may contain (files.py). It is not: the state of the optimizer (trainer_state.py).

Names in a project folder: rwkv-init.pth (epoch -1), rwkv-N.pth (after mini-epoch N), rwkv-final.pth (the end of a run,
never resumed from); everything else is left alone.
Source: RWKV-LM `RWKV-v5/train.py` and `src/trainer.py`, which this repairs (atomic writing, foreign names, bad files).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkv_nb.model.weights import strip_prefix
from rwkv_nb.training.agreement import first_process
from rwkv_nb.training.files import CheckpointError, read_tensors, write_tensors

if TYPE_CHECKING:
    from rwkv_nb.training.config import TrainConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
INIT_EPOCH = -1


def save_checkpoint(
    model: torch.nn.Module | Mapping[str, torch.Tensor], path: str | os.PathLike, dtype: str = "bf16"
) -> Path:
    """Write the weights to `path` as the official trainer does, all in one dtype: "bf16", "fp16" or "fp32".

    The file appears under its name only when it is complete and on the disk: a full disk or a killed process leaves the
    earlier file as it was. Raises ValueError for another dtype, and OSError as the system gives it; where the
    disk is full, with the room that the file needs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    weights = model.state_dict() if isinstance(model, torch.nn.Module) else model
    flat = {strip_prefix(name): _stored(tensor, DTYPES[dtype]) for name, tensor in weights.items()}
    return write_tensors(flat, path)


def load_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Name -> tensor on the CPU, as stored; prefixes that training frameworks add are taken off.

    Raises FileNotFoundError; CheckpointError for a file that is damaged, holds code, or is no dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of a .pth file, or build one with stage 1")
    loaded = read_tensors(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not names with tensors; it is no model")
    foreign = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if foreign or not loaded:
        what = f"{foreign[0]!r} is no tensor" if foreign else "it is empty"
        raise CheckpointError(f"{path}: {what}; save the model's state_dict alone, not a trainer's checkpoint")
    return {strip_prefix(str(name)): tensor for name, tensor in loaded.items()}


def list_checkpoints(proj_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """(epoch, path) of every rwkv-init.pth (epoch -1) and rwkv-N.pth in the folder, oldest first."""
    folder = Path(proj_dir)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"rwkv-(init|\d+)\.pth", path.name)
        if match and path.is_file():
            found.append((INIT_EPOCH if match[1] == "init" else int(match[1]), path))
    return sorted(found)


def newest_checkpoint(proj_dir: str | os.PathLike) -> tuple[int, Path]:
    """(epoch, path) of the checkpoint to resume from. Raises FileNotFoundError that says how to make the first one."""
    found = list_checkpoints(proj_dir)
    if not found:
        raise FileNotFoundError(
            f"{proj_dir}: no rwkv-init.pth or rwkv-N.pth to start from; build initial weights with my_pile_stage=1, or "
            "put a model there under the name rwkv-init.pth"
        )
    return found[-1]


def init_checkpoint(cfg: TrainConfig) -> Path:
    """Write proj_dir/rwkv-init.pth with `initial_weights`, in the dtype of `cfg.precision` (stage 1)."""
    return save_checkpoint(initial_weights(cfg), Path(cfg.proj_dir) / "rwkv-init.pth", cfg.precision)


def initial_weights(cfg: TrainConfig) -> dict[str, torch.Tensor]:
    """Official initial weights; with `cfg.load_model` they are grown from that model.

    `cfg.vocab_size` must be known; `cfg.random_seed`, if not negative, makes the weights repeatable.
    """
    if cfg.vocab_size <= 0:
        raise ValueError("vocab_size=0: the size of the vocabulary must be known to build weights; 65536 for World")
    from rwkv_nb.model.growing import grow
    from rwkv_nb.model.initialization import init_weights

    seed = cfg.random_seed if cfg.random_seed >= 0 else None
    weights = init_weights(cfg.model_config(), seed=seed, recipe=cfg.recipe, lr_init=cfg.lr_init)
    if cfg.load_model not in ("", "0"):
        try:
            weights = grow(weights, load_checkpoint(cfg.load_model))
        except ValueError as error:
            raise CheckpointError(f"{cfg.load_model}: {error}") from error
    return weights


def starting_checkpoint(cfg: TrainConfig) -> tuple[int, Path, dict[str, torch.Tensor]]:
    """(epoch, path, weights) that a run of `cfg` begins with; epoch N means that mini-epoch N is done, -1 that none is.

    `cfg.load_model` if given ("0" counts as not given, as in the official script); else in stages 2 to 4 the newest
    readable checkpoint of proj_dir, where a damaged one is named in a warning and passed over; else new, initial ones.
    Stage 1 always makes new ones, grown from `cfg.load_model` if that is given. Of several processes the first alone
    writes new ones; the others have some of their own until it hands out its own (strategies.py).
    """
    if cfg.load_model not in ("", "0") and cfg.my_pile_stage != 1:
        return cfg.epoch_begin - 1, Path(cfg.load_model), load_checkpoint(cfg.load_model)
    if cfg.my_pile_stage < 2:
        if not first_process(cfg):
            return INIT_EPOCH, Path(cfg.proj_dir) / "rwkv-init.pth", initial_weights(cfg)
        path = init_checkpoint(cfg)
        return INIT_EPOCH, path, load_checkpoint(path)
    newest_checkpoint(cfg.proj_dir)  # raises if there is none
    for epoch, path in reversed(list_checkpoints(cfg.proj_dir)):
        try:
            return epoch, path, load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    raise CheckpointError(f"{cfg.proj_dir}: every checkpoint is damaged; put a good one there as rwkv-init.pth")


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as the file holds it; a view is copied, because torch.save writes all the memory behind a tensor."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
