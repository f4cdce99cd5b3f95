"""The bookkeeping of a run: log, checkpoints and end as the official trainer has them, and states to go on from.

It is: a Lightning callback; the last of them, because it decides whether the run may end here. It is not: the schedule
(LitRWKV sets the rates), a view for people (monitor.py), or the choice of the file to begin with (resume.py).

A mini-epoch is `cfg.epoch_steps` batches. After each, train_log.txt gets a line "epoch loss exp(loss) lr time n", with
the mean loss of all processes and n, the mini-epochs since the (re)start; val_split adds the loss on held-out data.
rwkv-N.pth is written if n is a multiple of epoch_save or the last of epoch_count. The end of the run, however it comes,
writes rwkv-final.pth, once; a mini-epoch cut short leaves its line and no rwkv-N.pth.
A trainer state is written before each rwkv-N.pth, within a mini-epoch every save_minutes or save_steps, and before
rwkv-final.pth. The order is state, checkpoint, line of the log: a run killed in between has its state, and the next one
completes the rest. A file that cannot be written (a full disk) ends the run only if it is the last one.
Source: RWKV-LM `RWKV-v5/src/trainer.py`.
"""

from __future__ import annotations

import datetime
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from rwkv_nb.training.checkpoint import save_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import remove_orphans
from rwkv_nb.training.interrupts import Stop
from rwkv_nb.training.machine import wide
from rwkv_nb.training.resume import Start, complete, prune_states
from rwkv_nb.training.schedule import exit_reached
from rwkv_nb.training.strategies import full_weights
from rwkv_nb.training.trainer_state import TrainerState, random_state, restore_random
from rwkv_nb.training.whole_state import can_be_whole, loss_scale, restore_loss_scale, restore_whole, whole_state

AGREE_EVERY = 8  # steps between two moments at which several processes agree whether it is time for a state


class RunBook(pl.Callback):
    """The official bookkeeping, trainer states, and the end by my_exit_tokens, my_exit or a signal."""

    def __init__(self, cfg: TrainConfig, start: Start | None = None, stop: Stop | None = None) -> None:
        super().__init__()
        self.cfg, self.folder = cfg, Path(cfg.proj_dir)
        self.stop = stop if stop is not None else Stop()
        self._state, self._path = (start.state, start.path) if start is not None else (None, None)
        self._began = start.position if start is not None else (cfg.epoch_begin, 0)
        self._random: dict[str, Any] | None = None  # to be put back before the first step
        self._epoch, self._loss_sum, self._batches = cfg.epoch_begin, 0.0, 0
        self._line, self._saved_at, self._ours = "", None, set()
        self._wants_to_stop, self._due = False, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.take_over()
        if trainer.is_global_zero:
            for name in remove_orphans(self.folder):
                warnings.warn(f"{self.folder / name}: removed, a killed run left it unfinished", stacklevel=2)
            if self._state is not None:
                self._ours.add(complete(self._state, self._path, self.folder, self.cfg.precision))
        now = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        self._log(trainer, f"NEW RUN {now}\n{self.cfg.flags()}\n")
        if self._state is not None:
            self._restore(trainer, pl_module, self._state)
        self._state, self._last_save = None, time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = self.cfg.epoch_begin + trainer.current_epoch
        if epoch != self._epoch:
            self._epoch, self._loss_sum, self._batches = epoch, 0.0, 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random is not None:
            restore_random(self._random, pl_module.device)
            self._random = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss_sum = self._loss_sum + wide(pl_module.last_loss)  # a tensor on a GPU stays there: no waiting
        self._batches += 1
        self._line = ""
        if exit_reached(trainer.global_step, self.cfg):
            trainer.should_stop = True
        if self._batches % self.cfg.accumulate_grad_batches:  # within a step: what it has collected would be lost
            self._wants_to_stop |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._wants_to_stop or self.stop.number is not None
        self._due = self._state_due(trainer)
        if self._due and self._batches < self.cfg.epoch_steps:
            self._save_state(trainer, pl_module, last=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        since_start, complete = trainer.current_epoch, self._batches == self.cfg.epoch_steps
        due = self.cfg.epoch_save > 0 and since_start % self.cfg.epoch_save == 0
        if self._batches:
            loss = float(trainer.strategy.reduce(torch.as_tensor(self._loss_sum), reduce_op="mean")) / self._batches
            perplexity = math.exp(min(loss, 700.0))
            numbers = f"{self._epoch} {loss:.6f} {perplexity:.4f} {pl_module.last_lr:.8f}"
            held_out = "" if pl_module.last_val_loss is None else f" {pl_module.last_val_loss:.6f}"
            self._line = f"{numbers} {datetime.datetime.now()} {since_start}{held_out}\n"
        if complete and (due or since_start == self.cfg.epoch_count - 1):
            name = f"rwkv-{self._epoch}.pth"
            state = self._save_state(trainer, pl_module, last=False, checkpoint=name)
            if self._save_weights(trainer, pl_module, name, last=False) and state is not None:
                state.replace(self.folder / f"rwkv-{self._epoch}.state")
                self._ours.add(self.folder / f"rwkv-{self._epoch}.state")
        elif complete and self._due:
            self._save_state(trainer, pl_module, last=False)
        self._log(trainer, self._line)
        if self._epoch >= self.cfg.my_exit:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        failed, unsaved = None, self._saved_at != (self._epoch, self._batches)
        if trainer.world_size > 1:  # the first process may have failed to write
            unsaved = trainer.strategy.reduce_boolean_decision(unsaved, all=False)
        if self._batches % self.cfg.accumulate_grad_batches == 0 and unsaved:
            try:
                self._save_state(trainer, pl_module, last=True)
            except OSError as error:
                failed = error
        try:
            self._save_weights(trainer, pl_module, "rwkv-final.pth", last=True)
        finally:
            trainer.strategy.barrier("files are complete")  # for every process, also if the first could not write
        if failed is not None:
            raise failed

    def _state_due(self, trainer: pl.Trainer) -> bool:
        """Whether it is time for a state within the mini-epoch: the same answer in every process."""
        every, minutes = self.cfg.save_steps, self.cfg.save_minutes
        late = minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes
        if trainer.world_size > 1 and minutes > 0:  # the first one's clock counts: it knows when it had written
            late = late and trainer.is_global_zero
            asked = trainer.global_step % AGREE_EVERY == 0
            late = asked and trainer.strategy.reduce_boolean_decision(late, all=False)
        return late or (every > 0 and trainer.global_step % every == 0)

    def _save_state(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, last: bool, checkpoint: str = ""
    ) -> Path | None:
        """Write a state, if this run writes any, and prune older ones; every process must call it. Its path."""
        if not self.cfg.save_state or not can_be_whole(trainer.strategy):
            return None
        ranks = [{"loss_sum": float(self._loss_sum), "random": random_state(pl_module.device)}]
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, ranks[0])
            ranks = everyone
        before, self._saved_at = self._saved_at, (self._epoch, self._batches)
        weights, optimizer = whole_state(trainer, pl_module.model)
        if not trainer.is_global_zero:
            return None
        state = TrainerState(
            epoch=self._epoch, batch=self._batches, step=trainer.global_step, epoch_begin=self.cfg.epoch_begin,
            warmup_steps=self.cfg.warmup_steps, flags=self.cfg.flags(),
            n_tokens=getattr(pl_module.dataset, "n_tokens", 0), weights=weights, optimizer=optimizer,
            scaler=loss_scale(trainer), ranks=ranks, checkpoint=checkpoint,
            log_line=self._line if self._batches == self.cfg.epoch_steps else "",
        )  # fmt: skip
        path = self.folder / f"rwkv-{self._epoch}.{self._batches}.state"
        try:
            state.save(path)
        except OSError as error:
            self._saved_at = before
            if last:
                raise
            warnings.warn(f"{error}; the run goes on", stacklevel=2)
            return None
        finally:
            self._last_save = time.monotonic()  # now, as a large state takes minutes
        self._ours.add(path)
        aside = prune_states(self.folder, self._ours, self._began, self.cfg.epoch_steps)
        if aside and self.cfg.my_pile_stage >= 2:  # stage 0 begins anew, and its files are overwritten one by one
            warnings.warn(f"{self.folder}: this run did not go on from {', '.join(aside)}: renamed, with .old at the "
                          "end", stacklevel=2)  # fmt: skip
        return path

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: TrainerState) -> None:
        restore_whole(trainer, pl_module.model, state.weights, state.optimizer)
        restore_loss_scale(trainer, state.scaler)
        rank = state.ranks[trainer.global_rank]
        self._random, self._loss_sum = rank["random"], rank["loss_sum"]
        self._epoch, self._batches = state.epoch, state.batch
        self._saved_at = (state.epoch, state.batch)

    def _save_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, last: bool) -> bool:
        weights = full_weights(trainer.strategy, pl_module.model)  # where the model is cut, every process takes part
        if not trainer.is_global_zero:
            return False
        try:
            save_checkpoint(weights, self.folder / name, self.cfg.precision)
        except OSError as error:
            if last:
                raise
            warnings.warn(f"{error}; the run goes on", stacklevel=2)
            return False
        return True

    def _log(self, trainer: pl.Trainer, text: str) -> None:
        if not trainer.is_global_zero or not text:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "train_log.txt", "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            warnings.warn(f"{error}; the run goes on without a line in it", stacklevel=2)
