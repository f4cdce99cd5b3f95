"""Two numbers about a model: how well it predicts unseen tokens, and how fast it will train here.

It is: `evaluate` and `measure_tokens_per_second`. It is not: part of a run; neither changes the model.

Symbols: B windows in a batch, T = ctx_len tokens in a window, V tokens in the vocabulary.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from rwkv_nb.model.loss import next_token_loss, token_losses
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.machine import autocast, keep_freed_memory
from rwkv_nb.training.optimizer import build_optimizer


def evaluate(
    model: torch.nn.Module,
    tokens: Any,
    ctx_len: int,
    batch_size: int = 16,
    n_windows: int | None = None,
    bf16: bool = False,
) -> float:
    """Mean loss in nats a token on `tokens` (1-D, integers): the same windows each time, spread evenly over the whole.

    Each window of ctx_len tokens starts without memory of what came before, as in training. n_windows=None: as many as
    fit side by side. Raises ValueError if not even one fits.
    """
    tokens = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
    fit = (len(tokens) - 1) // ctx_len
    if fit < 1:
        raise ValueError(f"tokens: {len(tokens)} are too few for one window; give at least ctx_len + 1 = {ctx_len + 1}")
    n_windows = fit if n_windows is None else n_windows
    starts = np.linspace(0, len(tokens) - 1 - ctx_len, n_windows).round().astype(np.int64)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.no_grad(), autocast("bf16" if bf16 else "fp32", device.type):
            for first in range(0, n_windows, batch_size):
                some = starts[first : first + batch_size]
                windows = torch.stack([tokens[start : start + ctx_len + 1] for start in some]).to(device)
                total += float(token_losses(model, windows[:, :-1], windows[:, 1:]).sum())
    finally:
        model.train(was_training)
    return total / (n_windows * ctx_len)


def measure_tokens_per_second(cfg: TrainConfig, model: RWKV, dataset: Dataset, steps: int = 5) -> float:
    """Tokens a second that training on this machine will reach (median of `steps`, after two that warm up).

    Works on a copy: the model is not changed. Meant for choosing my_exit_tokens for a given time.
    """
    if cfg.accelerator == "cpu":
        keep_freed_memory()
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, cfg)
    durations = []
    for batch in _endlessly(DataLoader(dataset, batch_size=cfg.micro_bsz, drop_last=True)):
        started = time.perf_counter()
        idx, targets = (part.to(device) for part in batch)
        with autocast(cfg.precision, device.type):
            loss = next_token_loss(model, idx, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        float(loss.detach())  # on a GPU: wait for it
        durations.append(time.perf_counter() - started)
        if len(durations) == steps + 2:
            break
    return cfg.real_bsz * cfg.ctx_len / statistics.median(durations[2:])


def _endlessly(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader
