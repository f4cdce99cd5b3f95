"""Metrics of every step for people who compare runs: CSV, TensorBoard, Weights & Biases, through Lightning's loggers.

    proj_dir/csv/version_N/metrics.csv          --logger csv
    proj_dir/tensorboard/version_N/events...    --logger tensorboard; look with `tensorboard --logdir out/tensorboard`
    the project of that name                    --wandb NAME; WANDB_MODE=offline keeps it in proj_dir/wandb

It is: the loggers that flags ask for, and a callback that feeds them. It is not: train_log.txt (runbook.py), which is
always written. Each package is imported only when its logger is asked for.

Metrics, as the official trainer names them: loss (mean over all processes and the batches of the step), lr, wd,
Gtokens (10^9 tokens since the very beginning), kt/s (thousands of tokens a second). The step counts restarts too.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, Logger

from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.machine import wide
from rwkv_nb.training.schedule import real_step, real_tokens, weight_decay

FLUSH_EVERY = 20  # steps; what a killed run may lose of metrics.csv


def run_loggers(cfg: TrainConfig) -> list[Logger]:
    """Lightning's loggers for `cfg.logger` and `cfg.wandb`; none by default. Raises ModuleNotFoundError as they do."""
    made: list[Logger] = []
    if cfg.logger == "csv":
        made.append(CSVLogger(cfg.proj_dir, name="csv", flush_logs_every_n_steps=FLUSH_EVERY))
    elif cfg.logger == "tensorboard":
        from pytorch_lightning.loggers import TensorBoardLogger

        made.append(TensorBoardLogger(cfg.proj_dir, name="tensorboard", default_hp_metric=False))
    if cfg.wandb:
        from pytorch_lightning.loggers import WandbLogger

        now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        Path(cfg.proj_dir).mkdir(parents=True, exist_ok=True)  # else wandb writes to a temporary folder
        made.append(WandbLogger(f"{cfg.run_name} {now}", save_dir=cfg.proj_dir, project=cfg.wandb, save_code=False))
    return made


class Metrics(pl.Callback):
    """Gives every logger of the trainer the metrics of each step, and the flags at the start."""

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._loss_sum, self._batches = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self.cfg.flags())
        self._step, self._then = trainer.global_step, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss_sum = self._loss_sum + wide(pl_module.last_loss)
        self._batches += 1
        step = trainer.global_step
        if step == self._step:
            return  # gradients are still being collected
        loss = trainer.strategy.reduce(torch.as_tensor(self._loss_sum / self._batches), reduce_op="mean")
        now = time.perf_counter()
        speed = (step - self._step) * self.cfg.tokens_per_step / (now - self._then) / 1000
        metrics = {
            "loss": float(loss),
            "lr": pl_module.last_lr,
            "wd": weight_decay(step - 1, self.cfg),
            "Gtokens": real_tokens(step, self.cfg) / 1e9,
            "kt/s": speed,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=real_step(step, self.cfg))
        self._step, self._then, self._loss_sum, self._batches = step, now, 0.0, 0
