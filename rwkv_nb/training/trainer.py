"""One training run: the model in Lightning's loop, with the official schedule, log, checkpoints and end.

It is: `train`, which puts the model (module.py) into a Trainer together with the bookkeeping of runbook.py. It is not:
an engine; the loop, the devices and the strategies are Lightning's.
Source: RWKV-LM `RWKV-v5/train.py` and `src/trainer.py`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV, check_weights
from rwkv_nb.training.checkpoint import CheckpointError, save_checkpoint, starting_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.interrupts import quiet, stop_on_interrupt
from rwkv_nb.training.loggers import Metrics, run_loggers
from rwkv_nb.training.machine import PRECISION, fast_bf16, keep_freed_memory, tf32_products
from rwkv_nb.training.measure import evaluate, measure_tokens_per_second
from rwkv_nb.training.module import LitRWKV
from rwkv_nb.training.monitor import Monitor, ProgressBar, Record
from rwkv_nb.training.runbook import RunBook
from rwkv_nb.training.schedule import exit_reached

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
) -> RWKV:
    """Train as `cfg` says and return the model, on the CPU, in evaluation mode; its files are in `cfg.proj_dir`.

    model: trained in place; None: starts from `starting_checkpoint(cfg)`, and a resumed run goes on with the mini-epoch
    after it. dataset: None for the one that `cfg` describes. max_seconds: stop after this much training time. progress:
    False prints nothing. Stage 1 only writes rwkv-init.pth, a run that is over only rwkv-final.pth. An interrupt
    (Ctrl-C, or a notebook's stop button) ends the run after the step at hand, as a normal end. Raises ValueError before
    anything is written if the run is impossible.
    """
    cfg.validate()
    _refuse(cfg)
    own_data = dataset is None
    if own_data:
        dataset = TokenDataset(DataConfig.from_flags(cfg), seed=max(0, cfg.random_seed))
    cfg = cfg.replace(vocab_size=_vocab_size(cfg, dataset))
    _check_model(cfg, model)
    if cfg.random_seed >= 0:
        random.seed(cfg.random_seed)
        np.random.seed(cfg.random_seed % 2**32)
        torch.manual_seed(cfg.random_seed)
    if model is None:
        model, cfg = _starting_model(cfg)
    if cfg.my_pile_stage == 1:
        return model.eval()
    if exit_reached(0, cfg):
        save_checkpoint(model, Path(cfg.proj_dir) / "rwkv-final.pth", cfg.precision)
        return model.eval()
    if progress:
        print("\n".join([dataset.describe(), *(f"note: {note}" for note in cfg.notes())]))
    if cfg.accelerator == "cpu":
        keep_freed_memory()

    extra: list[pl.Callback] = [RunBook(cfg)]
    if max_seconds is not None:
        extra.append(Monitor(every_seconds=None, max_seconds=max_seconds))
    if progress and cfg.enable_progress_bar:
        extra.append(ProgressBar())
    if cfg.logger != "none" or cfg.wandb:
        extra.append(Metrics(cfg))
    with quiet(), tf32_products(cfg.precision != "fp32"):
        trainer = _trainer(cfg, [*callbacks, *extra])
        if own_data and trainer.world_size > 1:
            dataset = TokenDataset(
                dataset.config, rank=trainer.global_rank, world_size=trainer.world_size, seed=max(0, cfg.random_seed)
            )
        with stop_on_interrupt(trainer):
            trainer.fit(LitRWKV(model.train(), cfg, dataset))
    return model.cpu().eval()


def _refuse(cfg: TrainConfig) -> None:
    """Raise ValueError for flags that are known but that this trainer does not carry out."""
    refused = [
        (cfg.my_qa_mask == 1, "my_qa_mask=1: a masked loss is not built; use 0 or 2"),
        (cfg.grad_cp > 0, f"grad_cp={cfg.grad_cp}: activations are not recomputed here; use 0 and a smaller micro_bsz"),
        (cfg.my_pile_stage == 1 and cfg.load_model not in ("", "0"),
         f"load_model={cfg.load_model!r}: stage 1 builds new weights and does not grow others; leave it empty"),
    ]  # fmt: skip
    messages = [text for bad, text in refused if bad]
    if messages:
        raise ValueError("this run cannot start:\n" + "\n".join(f"  - {text}" for text in messages))


def _check_model(cfg: TrainConfig, model: RWKV | None) -> None:
    """Raise ValueError for sizes and options that no model has, or that `model` has not."""
    config = cfg.model_config()
    for name in ("n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size_a", "head_size_divisor"):
        wanted, has = getattr(config, name), getattr(model.config if model is not None else config, name)
        if wanted != has:
            raise ValueError(f"{name}={wanted}: the model given has {has}; build it from cfg.model_config()")


def _starting_model(cfg: TrainConfig) -> tuple[RWKV, TrainConfig]:
    """The model to begin with, in float32, and `cfg` with the epoch_begin and warm-up that follow from its file."""
    epoch, path, weights = starting_checkpoint(cfg)
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
    return RWKV(config, {name: tensor.float() for name, tensor in weights.items()}), cfg.replace(**changes)


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
    return pl.Trainer(
        accelerator=cfg.accelerator,
        devices=cfg.devices,
        num_nodes=cfg.num_nodes,
        strategy=cfg.strategy,
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
