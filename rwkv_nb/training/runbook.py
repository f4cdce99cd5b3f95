"""The bookkeeping of a run, as the official trainer does it: log, checkpoints, and when it is over.

It is: a Lightning callback. It is not: the schedule (LitRWKV sets the rates) nor a view for people (see monitor.py).

A mini-epoch is `cfg.epoch_steps` batches. After each, train_log.txt gets a line "epoch loss exp(loss) lr time n", with
the mean loss of all processes and n, the mini-epochs since the (re)start; rwkv-N.pth is written if n is a multiple of
epoch_save or the last of epoch_count. The end of the run, however it comes, writes rwkv-final.pth, once; a mini-epoch
cut short leaves its line and no rwkv-N.pth.
Source: RWKV-LM `RWKV-v5/src/trainer.py`.
"""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rwkv_nb.training.checkpoint import save_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.schedule import exit_reached


class RunBook(pl.Callback):
    """The official bookkeeping: train_log.txt, rwkv-N.pth, rwkv-final.pth, and the end by my_exit_tokens or my_exit."""

    def __init__(self, cfg: TrainConfig) -> None:
        super().__init__()
        self.cfg, self.folder = cfg, Path(cfg.proj_dir)
        self._loss_sum, self._batches = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        self._log(trainer, f"NEW RUN {now}\n{self.cfg.flags()}\n")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss_sum = self._loss_sum + pl_module.last_loss.double()  # a tensor on a GPU stays there: no waiting
        self._batches += 1
        if exit_reached(trainer.global_step, self.cfg):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        since_start, complete = trainer.current_epoch, self._batches == trainer.num_training_batches
        epoch = self.cfg.epoch_begin + since_start
        due = self.cfg.epoch_save > 0 and since_start % self.cfg.epoch_save == 0
        if complete and (due or since_start == self.cfg.epoch_count - 1):
            self._save(trainer, pl_module, f"rwkv-{epoch}.pth")
        if self._batches:
            loss = float(trainer.strategy.reduce(torch.as_tensor(self._loss_sum), reduce_op="mean")) / self._batches
            perplexity = math.exp(min(loss, 700.0))
            numbers = f"{epoch} {loss:.6f} {perplexity:.4f} {pl_module.last_lr:.8f}"
            self._log(trainer, f"{numbers} {datetime.datetime.now()} {since_start}\n")
        self._loss_sum, self._batches = 0.0, 0
        if epoch >= self.cfg.my_exit:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module, "rwkv-final.pth")

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        if trainer.is_global_zero:
            save_checkpoint(pl_module.model, self.folder / name, self.cfg.precision)

    def _log(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "train_log.txt", "a", encoding="utf-8") as file:
                file.write(text)
