"""Where a run begins: which file of a project folder it goes on from, and what becomes of older trainer states.

It is: the choice, with its reasons in words; the completion of what a killed run left half done; the pruning of states.
It is not: the content of a state (trainer_state.py) or of a checkpoint (checkpoint.py).

Stages 2 to 4 take the newest readable file: a state within a mini-epoch is newer than the rwkv-N.pth before it. A state
beside rwkv-N.pth is used if it belongs to that file and to the flags; else the weights alone, as the official trainer
does it. To go back, delete the newer rwkv-N.pth and the newer states. With load_model, or in stages 0 and 1, nothing is
looked for; a load_model that ends in .state is a state to go on from, in every stage but 1.
Source of the choice among rwkv-N.pth: RWKV-LM `RWKV-v5/train.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import check_weights
from rwkv_nb.training.checkpoint import (
    INIT_EPOCH,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    starting_checkpoint,
)
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import CheckpointError
from rwkv_nb.training.trainer_state import TrainerState

KEEP = 2  # newest states that stay in a folder: one, and one more in case that one is lost
_STATE = re.compile(r"rwkv-(\d+)(?:\.(\d+))?\.state")
Position = tuple[int, int]  # mini-epoch at hand, batches done in it


@dataclass
class Start:
    """What a run begins with: `cfg` has the epoch_begin and warm-up in force; state None means weights alone."""

    cfg: TrainConfig
    path: Path
    weights: dict[str, torch.Tensor]
    state: TrainerState | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def position(self) -> Position:
        return (self.state.epoch, self.state.batch) if self.state else (self.cfg.epoch_begin, 0)


def find_start(cfg: TrainConfig, n_tokens: int = 0) -> Start:
    """The beginning of a run of `cfg` on data of `n_tokens` tokens. `notes` says what was passed over, and why.

    Raises FileNotFoundError if there is nothing to begin with, CheckpointError if nothing there can be read, or if the
    file that load_model names does not fit.
    """
    if cfg.load_model.endswith(".state"):
        path = Path(cfg.load_model)
        if not path.is_file():
            raise FileNotFoundError(f"load_model={path}: no such state; older ones are removed as a run goes on, see "
                                    f"the folder for rwkv-N.state and rwkv-N.B.state")
        state = TrainerState.load(path)
        reason = _unusable(state, cfg, n_tokens)
        if reason:
            raise CheckpointError(f"load_model={path}: cannot go on from there: {reason}")
        return _from_state(cfg, path, state, [])
    notes: list[str] = []
    if cfg.resume == "state" and cfg.my_pile_stage >= 2 and cfg.load_model in ("", "0"):
        if not list_states(cfg.proj_dir):
            newest_checkpoint(cfg.proj_dir)  # raises, with the remedy, if there is no checkpoint either
        for path, is_state in _newest_first(cfg):
            try:
                if not is_state:
                    return _from_weights(cfg, _epoch_of(path), path, load_checkpoint(path), notes)
                state = TrainerState.load(path)
                reason = _unusable(state, cfg, n_tokens) or _other_place(path, state) or _other_file(path, state, notes)
                if not reason:
                    return _from_state(cfg, path, state, notes)
                notes.append(f"{path}: passed over, the run goes on from weights alone: {reason}")
            except CheckpointError as error:
                notes.append(f"passed over: {error}")
        raise CheckpointError("\n".join([f"{cfg.proj_dir}: no checkpoint can be read; put a good one there as "
                                         "rwkv-init.pth", *notes]))  # fmt: skip
    epoch, path, weights = starting_checkpoint(cfg)
    return _from_weights(cfg, epoch, path, weights, notes)


def list_states(proj_dir: str | os.PathLike) -> list[tuple[int, int | None, Path]]:
    """(mini-epoch, batches done or None for all, path) of every trainer state in the folder, in no order."""
    folder, found = Path(proj_dir), []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STATE.fullmatch(path.name)
        if match and path.is_file():
            found.append((int(match[1]), None if match[2] is None else int(match[2]), path))
    return found


def complete(state: TrainerState, path: Path, folder: Path, precision: str) -> Path:
    """Do what a run that was killed between two files had still to do: rwkv-N.pth, the state's last name, the log.

    Returns the path that the state has now.
    """
    if state.checkpoint:
        checkpoint = folder / state.checkpoint
        try:
            whole = state.belongs_to(load_checkpoint(checkpoint))
        except (FileNotFoundError, CheckpointError):
            whole = False
        if not whole:
            save_checkpoint(state.weights, checkpoint, precision)
        if path.parent.resolve() == folder.resolve():
            path = path.replace(checkpoint.with_suffix(".state"))
    log = folder / "train_log.txt"
    if state.log_line and state.log_line not in (log.read_text(encoding="utf-8") if log.is_file() else ""):
        with open(log, "a", encoding="utf-8") as file:
            file.write(state.log_line)
    return path


def prune_states(proj_dir: str | os.PathLike, ours: set[Path], start: Position, epoch_steps: int) -> list[str]:
    """Keep the two newest states; returns the names of those set aside.

    ours: those that this run has written or went on from. Any other at or beyond `start` is of a run that was given up,
    or cannot be read, and would pass for the newest: it is renamed NAME.old, of which the two newest stay as well.
    """
    aside, kept = [], []
    for epoch, batch, path in list_states(proj_dir):
        position = _position(epoch, batch, epoch_steps)
        if position >= start and path not in ours:
            path.replace(path.with_name(path.name + ".old"))
            aside.append(path.name)
        else:
            kept.append((position, path))
    for _, path in sorted(kept)[:-KEEP]:
        path.unlink(missing_ok=True)
    old = sorted(Path(proj_dir).glob("rwkv-*.state.old"), key=lambda path: path.stat().st_mtime_ns)
    for path in old[:-KEEP]:
        path.unlink(missing_ok=True)
    return aside


def set_progress(trainer: pl.Trainer, since_start: int, step: int) -> None:
    """Tell a Trainer that has not begun yet that it has done so many mini-epochs and optimizer steps."""
    loop = trainer.fit_loop
    steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        progress.ready = progress.started = progress.processed = progress.completed = since_start
    steps.total.ready = steps.total.completed = step
    loop.epoch_loop._batches_that_stepped = step  # what Lightning's loggers take for the step
    if (trainer.current_epoch, trainer.global_step) != (since_start, step):
        raise RuntimeError(f"Lightning {pl.__version__} counts in another way; use resume=weights, or the version in "
                           "constraints.txt")  # fmt: skip


def _position(epoch: int, batch: int | None, epoch_steps: int) -> Position:
    return (epoch + 1, 0) if batch is None or batch >= epoch_steps else (epoch, batch)


def _newest_first(cfg: TrainConfig) -> Iterator[tuple[Path, bool]]:
    """(path, is it a state?), the newest position first and at each a state before the weights alone."""
    entries = [(_position(epoch, batch, cfg.epoch_steps), True, batch is None, path)
               for epoch, batch, path in list_states(cfg.proj_dir)]  # fmt: skip
    entries += [((epoch + 1, 0), False, False, path) for epoch, path in list_checkpoints(cfg.proj_dir)]
    for _, is_state, _, path in sorted(entries, reverse=True):
        yield path, is_state


def _epoch_of(path: Path) -> int:
    word = path.stem.split("-")[1]
    return INIT_EPOCH if word == "init" else int(word)


def _unusable(state: TrainerState, cfg: TrainConfig, n_tokens: int) -> str:
    reason = state.misfit(cfg, n_tokens)
    if not reason:
        try:
            check_weights(cfg.model_config(), state.weights)
        except ValueError as error:
            reason = str(error)
    return reason


def _other_place(path: Path, state: TrainerState) -> str:
    epoch, batch = _STATE.fullmatch(path.name).groups()
    if int(epoch) != state.epoch or (batch is not None and int(batch) != state.batch):
        return f"it was renamed: it is of mini-epoch {state.epoch}, batch {state.batch}"
    return ""


def _other_file(path: Path, state: TrainerState, notes: list[str]) -> str:
    """Why a state that has a checkpoint beside it does not belong to it."""
    checkpoint = path.with_suffix(".pth")
    if state.checkpoint != checkpoint.name:
        return ""
    try:
        return "" if state.belongs_to(load_checkpoint(checkpoint)) else f"{checkpoint.name} holds other weights"
    except FileNotFoundError:
        return f"{checkpoint.name} is not there any more"
    except CheckpointError as error:
        notes.append(f"{error}; {path.name} has the same weights and replaces it")
        return ""


def _from_state(cfg: TrainConfig, path: Path, state: TrainerState, notes: list[str]) -> Start:
    changed = state.changed_flags(cfg)
    if changed:
        notes.append(f"flags that have changed since {path.name}: {', '.join(changed)}")
    warmup = cfg.warmup_steps if cfg.warmup_steps >= 0 else state.warmup_steps
    cfg = cfg.replace(epoch_begin=state.epoch_begin, warmup_steps=warmup)
    if state.batch >= cfg.epoch_steps:  # its mini-epoch is over: the next one begins
        state.epoch, state.batch = state.epoch + 1, 0
        for rank in state.ranks:
            rank["loss_sum"] = 0.0
    notes.append(f"goes on from {path}: mini-epoch {state.epoch}, batch {state.batch} of {cfg.epoch_steps}")
    return Start(cfg, path, state.weights, state, notes)


def _from_weights(cfg: TrainConfig, epoch: int, path: Path, weights: dict, notes: list[str]) -> Start:
    config = cfg.model_config()
    if cfg.load_partial == 1:
        weights = {**init_weights(config, recipe=cfg.recipe, lr_init=cfg.lr_init), **weights}
    try:
        check_weights(config, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; load_partial=1 would fill in what is missing") from error
    changes: dict[str, Any] = {"epoch_begin": epoch + 1}
    if cfg.my_pile_stage >= 2 and epoch >= 0 and cfg.warmup_steps < 0:
        changes["warmup_steps"] = 10 if cfg.my_pile_stage == 2 else 30
    return Start(cfg.replace(**changes), path, weights, None, notes)
