"""The model as Lightning wants it: one training step, the optimizer with its rates, and the data of each mini-epoch.

It is: a LightningModule that holds an RWKV. It is not: the loop (trainer.py) or the bookkeeping (runbook.py).
Source: `training_step`, `configure_optimizers` and `on_train_batch_start` in RWKV-LM `RWKV-v5/src`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Subset

from rwkv_nb.data.dataset import TokenDataset
from rwkv_nb.model.loss import next_token_loss, token_losses
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.agreement import check_same
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.optimizer import set_rates
from rwkv_nb.training.schedule import learning_rate, weight_decay
from rwkv_nb.training.strategies import (
    be_patient,
    clip_gradients,
    cut_in_turn,
    head_stays_whole,
    loss_to_divide,
    make_optimizer,
    same_start,
)


class LitRWKV(pl.LightningModule):
    """An RWKV, its data and its schedule as Lightning wants them; `last_loss` and `last_lr` are the last step's.

    `last_val_loss`: None until a Validation has measured it. begins_with: what must be the same in all processes.
    """

    def __init__(
        self, model: RWKV, cfg: TrainConfig, dataset: TokenDataset, begins_with: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.model, self.cfg, self.dataset, self.begins_with = model, cfg, dataset, begins_with or {}
        self.done: dict[int, int] = {}  # mini-epoch -> its batches that an earlier run has already trained on
        self.last_loss = torch.tensor(float("nan"))
        self.last_lr = learning_rate(0, cfg)
        self.last_val_loss: float | None = None

    def setup(self, stage: str) -> None:
        check_same(self.begins_with)
        be_patient()
        if self.trainer.global_rank > 0 and self.cfg.random_seed >= 0:
            torch.manual_seed(self.cfg.random_seed + self.trainer.global_rank)  # dropout: each its own channels
        same_start(self.trainer.strategy, self.model)
        cut_in_turn(self.trainer.strategy, self)

    def on_train_start(self) -> None:
        # the first process may be writing a file: it is waited for here, as DeepSpeed's own groups wait ten minutes
        self.trainer.strategy.barrier("all begin")

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        idx, targets, *mask = batch  # (B, T) each; a mask only with my_qa_mask 1
        loss = next_token_loss(self.model, idx, targets, *mask, sliced=head_stays_whole(self.trainer.strategy))
        self.last_loss = loss.detach()
        return loss_to_divide(self.trainer.strategy, loss, self.cfg)

    def validation_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        idx, targets = batch  # (B, T) each
        return token_losses(self.model, idx, targets, sliced=head_stays_whole(self.trainer.strategy))  # (B, T)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.trainer.strategy, self.model, self.cfg)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        self.last_lr = learning_rate(step, self.cfg)
        set_rates(self.trainer.optimizers[0], self.cfg, self.last_lr, weight_decay(step, self.cfg))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own refuses fused optimizers under autocast, though without a loss scale they need no care
        clip_gradients(self.trainer.strategy, self, gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # after all callbacks. A signal or a clock may stop one process alone: the others would wait for it for ever
        if self.trainer.world_size > 1:
            stop = self.trainer.strategy.reduce_boolean_decision(self.trainer.should_stop, all=False)
            self.trainer.should_stop = stop

    def train_dataloader(self) -> DataLoader:
        # called before each mini-epoch: the dataset knows which one before an iterator, or a worker, is made from it
        ours, its = (self.trainer.global_rank, self.trainer.world_size), (self.dataset.rank, self.dataset.world_size)
        if ours != its:
            raise ValueError(f"dataset: made for (rank, world_size) = {its}, but this process is {ours}")
        epoch = self.cfg.epoch_begin + self.trainer.current_epoch
        self.dataset.set_epoch(epoch - self.dataset.config.epoch_begin)
        first = self.done.get(epoch, 0) * self.cfg.micro_bsz
        rest = self.dataset if first == 0 else Subset(self.dataset, range(first, len(self.dataset)))
        return DataLoader(
            rest, batch_size=self.cfg.micro_bsz, drop_last=True, pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else each iterator draws from the generator that dropout uses
        )  # fmt: skip
