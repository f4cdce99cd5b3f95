"""The model as Lightning wants it: one training step, the optimizer with its rates, and the data of each mini-epoch.

It is: a LightningModule that holds an RWKV. It is not: the loop (trainer.py) or the bookkeeping (runbook.py).
Source: `training_step`, `configure_optimizers` and `on_train_batch_start` in RWKV-LM `RWKV-v5/src`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from rwkv_nb.data.dataset import TokenDataset
from rwkv_nb.model.rwkv import RWKV, l2wrap_cross_entropy
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.optimizer import build_optimizer, set_rates
from rwkv_nb.training.schedule import learning_rate, weight_decay


class LitRWKV(pl.LightningModule):
    """An RWKV, its data and its schedule as Lightning wants them; `last_loss` and `last_lr` are the last step's."""

    def __init__(self, model: RWKV, cfg: TrainConfig, dataset: TokenDataset) -> None:
        super().__init__()
        self.model, self.cfg, self.dataset = model, cfg, dataset
        self.last_loss = torch.tensor(float("nan"))
        self.last_lr = learning_rate(0, cfg)

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        idx, targets = batch  # (B, T) each
        logits, _ = self.model(idx)  # (B, T, V)
        loss = l2wrap_cross_entropy(logits, targets)
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.cfg)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        self.last_lr = learning_rate(step, self.cfg)
        set_rates(self.trainer.optimizers[0], self.cfg, self.last_lr, weight_decay(step, self.cfg))

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own refuses fused optimizers under autocast, though without a loss scale they need no care
        torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def train_dataloader(self) -> DataLoader:
        # called before each mini-epoch: the dataset knows which one before an iterator, or a worker, is made from it
        ours, its = (self.trainer.global_rank, self.trainer.world_size), (self.dataset.rank, self.dataset.world_size)
        if ours != its:
            raise ValueError(f"dataset: made for (rank, world_size) = {its}, but this process is {ours}")
        self.dataset.set_epoch(self.cfg.epoch_begin + self.trainer.current_epoch - self.dataset.config.epoch_begin)
        return DataLoader(
            self.dataset, batch_size=self.cfg.micro_bsz, drop_last=True, pin_memory=self.device.type == "cuda"
        )
