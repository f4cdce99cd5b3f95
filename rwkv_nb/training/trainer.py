"""One training run: the model in Lightning's loop, with the official schedule, log, checkpoints and end.

It is: `train`, which puts the model (module.py) into a Trainer together with the bookkeeping of runbook.py. It is not:
an engine; the loop, the devices and the strategies are Lightning's.
Source: RWKV-LM `RWKV-v5/train.py` and `src/trainer.py`.
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.data.sources import Source
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.agreement import beginning, first_process
from rwkv_nb.training.checkpoint import load_checkpoint, save_checkpoint
from rwkv_nb.training.compiling import compiled
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import remove_orphans
from rwkv_nb.training.interrupts import Interrupted, quiet, stop_on_interrupt
from rwkv_nb.training.loggers import Metrics, run_loggers
from rwkv_nb.training.machine import PRECISION, fast_bf16, keep_freed_memory, tf32_products
from rwkv_nb.training.measure import evaluate, measure_tokens_per_second
from rwkv_nb.training.module import LitRWKV
from rwkv_nb.training.monitor import Monitor, ProgressBar, Record
from rwkv_nb.training.resume import Start, complete, find_start, set_progress
from rwkv_nb.training.runbook import RunBook
from rwkv_nb.training.schedule import exit_reached
from rwkv_nb.training.strategies import leaves_no_model, set_up
from rwkv_nb.training.validation import Validation

__all__ = [
    "LitRWKV", "Monitor", "ProgressBar", "Record", "RunBook",
    "evaluate", "fast_bf16", "keep_freed_memory", "measure_tokens_per_second", "train",
]  # fmt: skip

GRAD_CLIP = 1.0  # largest norm of the gradient of all parameters together


def train(
    cfg: TrainConfig,
    model: RWKV | None = None,
    dataset: TokenDataset | None = None,
    callbacks: Sequence[pl.Callback] = (),
    max_seconds: float | None = None,
    progress: bool = True,
    raise_interrupt: bool = False,
) -> RWKV:
    """Train as `cfg` says and return the model, on the CPU, in evaluation mode; its files are in `cfg.proj_dir`.

    model: trained in place; None: starts as `resume.find_start(cfg)` says, in stages 2 to 4 where an earlier run of
    this folder stopped. dataset: None for the one that `cfg` describes. max_seconds: stop after this much training
    time. progress: False prints nothing. Stage 1 only writes rwkv-init.pth, a run that is over only rwkv-final.pth.
    Ctrl-C, a notebook's stop button or SIGTERM end the run after the step at hand, everything saved: as a normal end,
    or with raise_interrupt=True as `Interrupted`, a KeyboardInterrupt that knows the exit code; a second one is
    immediate. Raises ValueError before anything is written if the run is impossible.
    """
    cfg.validate()
    _check_place(cfg)
    own_data = dataset is None
    if own_data:
        dataset = TokenDataset(DataConfig.from_flags(cfg), seed=max(0, cfg.random_seed))
    cfg = cfg.replace(vocab_size=_vocab_size(cfg, dataset))
    _check_model(cfg, model)
    if cfg.random_seed >= 0:
        random.seed(cfg.random_seed)
        np.random.seed(cfg.random_seed % 2**32)
        torch.manual_seed(cfg.random_seed)
    start = None
    if model is None:
        start = find_start(cfg, getattr(dataset, "n_tokens", 0))
        cfg = start.cfg
        model = RWKV(cfg.model_config(), {name: tensor.float() for name, tensor in start.weights.items()})
        _tell(start, progress)
    if cfg.my_pile_stage == 1:
        return model.eval()
    step, epoch = (start.state.step, start.state.epoch) if start and start.state else (0, cfg.epoch_begin)
    if exit_reached(step, cfg) or epoch > cfg.my_exit:
        _only_finish(cfg, model, start)
        return model.eval()
    if cfg.accelerator == "cpu":
        keep_freed_memory()
    model.grad_cp = cfg.grad_cp == 1

    extra: list[pl.Callback] = []
    if cfg.val_split > 0:
        extra.insert(0, Validation(_held_out(dataset), cfg.ctx_len, cfg.micro_bsz, cfg.val_every))
    if max_seconds is not None:
        extra.append(Monitor(every_seconds=None, max_seconds=max_seconds))
    if progress and cfg.enable_progress_bar:
        extra.append(ProgressBar())
    if cfg.logger != "none" or cfg.wandb:
        extra.append(Metrics(cfg))
    with quiet(), tf32_products(cfg.precision != "fp32"), stop_on_interrupt() as stop:
        trainer = _trainer(cfg, [*callbacks, *extra, RunBook(cfg, start, stop)])
        if own_data and trainer.world_size > 1:
            dataset = TokenDataset(
                dataset.config, rank=trainer.global_rank, world_size=trainer.world_size, seed=max(0, cfg.random_seed)
            )
        if progress and trainer.is_global_zero:
            print("\n".join([dataset.describe(), *(f"note: {note}" for note in cfg.notes())]))
        begins_with = beginning(cfg, start, getattr(dataset, "n_tokens", 0))
        module = LitRWKV(model.train(), cfg, dataset, begins_with)
        if start is not None and start.state is not None:
            set_progress(trainer, epoch - cfg.epoch_begin, step)
            module.done[epoch] = start.state.batch
        start = None  # RunBook lets go of it as soon as it is restored
        with compiled(model, cfg.compile == 1):
            trainer.fit(module)
    if stop.number is not None:
        interrupted = Interrupted(stop.number)
        if raise_interrupt:
            raise interrupted
        if progress:
            print(interrupted)
    if leaves_no_model(trainer.strategy) and trainer.is_global_zero:  # but the file has it
        weights = load_checkpoint(Path(cfg.proj_dir) / "rwkv-final.pth")
        model = RWKV(cfg.model_config(), {name: tensor.float() for name, tensor in weights.items()})
    return model.cpu().eval()


def _check_place(cfg: TrainConfig) -> None:
    """Raise ValueError for several devices where the program cannot be started once more for each of them."""
    several = cfg.devices * cfg.num_nodes > 1 and cfg.my_pile_stage != 1
    if several and hasattr(sys, "ps1") and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"devices={cfg.devices}, num_nodes={cfg.num_nodes}: each device needs the whole program, and a notebook or "
            "a Python prompt is none; give the flags to `python -m rwkv_nb train` in a terminal, or in a cell that "
            "begins with `!`"
        )


def _tell(start: Start, progress: bool) -> None:
    """What a user must know about the file that the run begins with: warnings, and where it goes on."""
    *passed_over, last = start.notes or [""]
    for note in [*passed_over, *([last] if start.state is None and last else [])]:
        warnings.warn(note, stacklevel=3)
    if progress and start.state is not None:
        print(last)


def _only_finish(cfg: TrainConfig, model: RWKV, start: Start | None) -> None:
    """The files of a run that was over before it began."""
    if not first_process(cfg):
        return
    folder = Path(cfg.proj_dir)
    remove_orphans(folder)
    if start is not None and start.state is not None:
        complete(start.state, start.path, folder, cfg.precision)
    save_checkpoint(model, folder / "rwkv-final.pth", cfg.precision)


def _held_out(dataset: TokenDataset) -> Source:
    """What Validation reads. Raises ValueError for a dataset that holds nothing out though the flag says so."""
    if dataset.held_out is None:
        raise ValueError("val_split: the dataset given holds nothing out; build it with the same val_split")
    return dataset.held_out


def _check_model(cfg: TrainConfig, model: RWKV | None) -> None:
    """Raise ValueError for sizes and options that no model has, or that `model` has not."""
    config = cfg.model_config()
    sizes = ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size_a", "head_size_divisor")
    for name in (*sizes, "pre_ffn", "head_qk", "tiny_att_dim", "tiny_att_layer", "my_pos_emb", "my_testing"):
        wanted, has = getattr(config, name), getattr(model.config if model is not None else config, name)
        if wanted != has:
            raise ValueError(f"{name}={wanted}: the model given has {has}; build it from cfg.model_config()")


def _vocab_size(cfg: TrainConfig, dataset: TokenDataset) -> int:
    """The vocabulary that flag and data agree on."""
    in_data = dataset.vocab_size
    if cfg.vocab_size > 0 and in_data > cfg.vocab_size:
        raise ValueError(
            f"vocab_size={cfg.vocab_size}: the data has {in_data} different tokens; use vocab_size={in_data}"
        )
    return max(cfg.vocab_size, in_data)


def _trainer(cfg: TrainConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer with everything switched off that writes, prints or shuffles of its own accord."""
    precision, dtype = PRECISION[cfg.precision]
    how: dict[str, Any] = {"precision": precision}
    if cfg.accelerator == "cpu" and dtype is torch.float16:  # Lightning itself would fall back to bfloat16
        how = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    trainer = pl.Trainer(
        accelerator=cfg.accelerator,
        devices=cfg.devices,
        num_nodes=cfg.num_nodes,
        strategy="ddp" if cfg.strategy == "auto" and cfg.devices * cfg.num_nodes > 1 else cfg.strategy,
        default_root_dir=os.path.join(cfg.proj_dir, ".lightning"),  # not there: under Slurm it would load hpc_ckpt_N
        max_epochs=-1,  # the end is RunBook's business, as in the official code
        accumulate_grad_batches=cfg.accumulate_grad_batches,
        gradient_clip_val=GRAD_CLIP,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,  # the dataset divides the samples among ranks
        num_sanity_val_steps=0,
        logger=run_loggers(cfg) or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **how,
    )
    set_up(trainer.strategy, cfg)
    return trainer
