"""The loss on data that training never sees, measured during a run by all processes together.

It is: a Lightning callback (`val_split`, `val_every`). It is not: the cut through the data (data/held_out.py), nor a
sampler: the held-out windows are read side by side, each without memory of the last.

Every process takes every world_size-th window; the sums are added up, so that all know the same mean, and so does one
process alone. Nothing of the run changes: no random number is drawn, no gradient kept.
The official trainer has no validation; its train_log.txt gets one more field at the end of a line, if val_split is set.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rwkv_nb.data.sources import Source
from rwkv_nb.training.machine import wide


class Validation(pl.Callback):
    """Sets `last_val_loss` of the module, in nats a token, every `every` steps (0: not) and after each mini-epoch.

    held_out: a Source, at least ctx_len + 1 tokens. history: (step, loss) of each time. Place it before RunBook.
    """

    def __init__(self, held_out: Source, ctx_len: int, batch_size: int, every: int = 0) -> None:
        super().__init__()
        self.held_out, self.ctx_len, self.batch_size, self.every = held_out, ctx_len, batch_size, every
        self.n_windows = (held_out.n_tokens - 1) // ctx_len
        self.history: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and trainer.global_step % self.every == 0:
            self._once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._once(trainer, pl_module)

    def _once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.history or self.history[-1][0] != trainer.global_step:  # several batches may make one step
            pl_module.last_val_loss = self.measure(trainer, pl_module)
            self.history.append((trainer.global_step, pl_module.last_val_loss))

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Mean loss in nats a token over all held-out windows, the same on every process."""
        strategy, was_training = trainer.strategy, pl_module.training
        # all processes take as many batches: with cut parameters each must join in every forward pass
        each = -(-self.n_windows // strategy.world_size)
        mine = [number * strategy.world_size + strategy.global_rank for number in range(each)]
        total = wide(torch.zeros((), device=pl_module.device))
        pl_module.eval()
        try:
            with torch.no_grad():
                for first in range(0, each, self.batch_size):
                    some = mine[first : first + self.batch_size]
                    windows = torch.stack([self._window(number) for number in some]).to(pl_module.device)
                    counts = torch.tensor([number < self.n_windows for number in some], device=pl_module.device)
                    losses = strategy.validation_step((windows[:, :-1], windows[:, 1:]), first)  # (B, T)
                    total += (wide(losses).sum(dim=1) * counts).sum()
        finally:
            pl_module.train(was_training)
        return float(strategy.reduce(total, reduce_op="sum")) / (self.n_windows * self.ctx_len)

    def _window(self, number: int) -> Tensor:
        start = min(number, self.n_windows - 1) * self.ctx_len  # past the end: the last again, not counted
        return torch.from_numpy(self.held_out.window(start, self.ctx_len + 1))
