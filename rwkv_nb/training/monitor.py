"""Watching a run: a clock that counts training alone, records for a plot, moments to look at the model, a progress bar.

It is: two Lightning callbacks. It is not: a logger; what to do with a record is the business of the function given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from rwkv_nb.training.schedule import last_step, real_tokens


@dataclass(frozen=True)
class Record:
    """Where a run stands. `loss` is the mean over the steps since the record before (nats a token, nan before any)."""

    step: int
    tokens: int
    seconds: float
    loss: float
    lr: float


class Monitor(pl.Callback):
    """Calls `on_record(record)` now and then, and `on_mark(mark, record, model)` at given moments of training time.

    Training time begins with the first step and stands still while these functions run, so that drawing and sampling
    cost the model nothing; `on_mark` sees the model in evaluation mode without gradients, and torch's random numbers
    drawn there do not change the run. Of several processes the first alone calls them. A mark of 0 is the model before
    its first step. If the run ends before the last marks, the end takes their place, once, with its time as the mark.

        Monitor(every_seconds=1.0, at_seconds=(0, 10, 30, 60), on_record=draw, on_mark=write, max_seconds=60)

    every_seconds, every_steps: how often to record (either or both; a last record is always made at the end).
    max_seconds: stop the run, cleanly, after the step that reaches this training time.
    `records` holds all records, `seconds` the training time so far.
    """

    def __init__(
        self,
        every_seconds: float | None = 1.0,
        every_steps: int | None = None,
        at_seconds: Sequence[float] = (),
        on_record: Callable[[Record], Any] | None = None,
        on_mark: Callable[[float, Record, torch.nn.Module], Any] | None = None,
        max_seconds: float | None = None,
    ) -> None:
        super().__init__()
        self.every_seconds, self.every_steps = every_seconds, every_steps
        self.on_record, self.on_mark = on_record, on_mark
        self.max_seconds = max_seconds
        self.marks = sorted(at_seconds)
        self.records: list[Record] = []
        self.seconds = 0.0
        self._loss_sum, self._loss_steps = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._next_record = self.every_seconds
        self._reach_marks(trainer, pl_module)
        self._resumed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self._resumed
        self._loss_sum = self._loss_sum + pl_module.last_loss  # a tensor on a GPU stays there: no waiting
        self._loss_steps += 1
        due = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        if self._next_record is not None and self.seconds >= self._next_record:
            due = True
            self._next_record = self.seconds + self.every_seconds
        if due:
            self._record(trainer, pl_module)
        self._reach_marks(trainer, pl_module)
        if self.max_seconds is not None:  # all processes stop together, as soon as one has reached the time
            late = self.seconds >= self.max_seconds
            trainer.should_stop |= trainer.strategy.reduce_boolean_decision(late, all=False)
        self._resumed = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loss_steps:
            self._record(trainer, pl_module)
        if self.marks:
            self._mark(self.seconds, trainer, pl_module)

    def _reach_marks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        while self.marks and self.seconds >= self.marks[0]:
            self._mark(self.marks.pop(0), trainer, pl_module)

    def _mark(self, mark: float, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.on_mark is None or not trainer.is_global_zero:
            return
        model, was_training = pl_module.model, pl_module.model.training
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                self.on_mark(mark, self._now(trainer, pl_module), model)
        finally:
            model.train(was_training)

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = self._now(trainer, pl_module)
        self._loss_sum, self._loss_steps = 0.0, 0
        self.records.append(record)
        if self.on_record is not None and trainer.is_global_zero:
            self.on_record(record)

    def _now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Record:
        if self._loss_steps:
            loss = float(self._loss_sum) / self._loss_steps
        else:
            loss = self.records[-1].loss if self.records else float("nan")
        tokens = real_tokens(trainer.global_step, pl_module.cfg)
        return Record(trainer.global_step, tokens, self.seconds, loss, pl_module.last_lr)


class ProgressBar(pl.Callback):
    """One line on stderr: steps, loss, learning rate, thousands of tokens a second, time left if the end is known."""

    def __init__(self, every_seconds: float = 0.5) -> None:
        super().__init__()
        self.every_seconds = every_seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar = tqdm(
            total=last_step(pl_module.cfg), initial=trainer.global_step, unit="step",
            disable=not trainer.is_global_zero, mininterval=self.every_seconds,
        )  # fmt: skip
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if now - self._last < self.every_seconds:
            return
        steps = trainer.global_step - self._bar.n
        speed = steps * pl_module.cfg.tokens_per_step / (now - self._last) / 1000
        self._last = now
        self._bar.set_postfix_str(
            f"loss {float(pl_module.last_loss):.3f}, lr {pl_module.last_lr:.2e}, {speed:.1f} Kt/s", refresh=False
        )
        self._bar.update(steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.update(trainer.global_step - self._bar.n)
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.close()
