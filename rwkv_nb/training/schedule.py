"""Learning rate, weight decay and the end of the run, as functions of the step alone.

It is: every branch of the official schedule, pure and exact. It is not: aware of a trainer, an optimizer or torch.

Symbols, with s = `step`, the trainer's count of optimizer steps since the (re)start:
    R = s + epoch_begin * steps_per_epoch          steps since the very beginning
    w = warmup_steps                               E = my_pile_edecay
    P_epochs = clip((R - E * steps_per_epoch - w + 1) / ((epoch_count - E) * steps_per_epoch - w), 0, 1)
    P_tokens = clip((R - w) / (|my_exit_tokens| / tokens_per_step - w), 0, 1)
Source: RWKV-LM `RWKV-v5/src/trainer.py`. Differences, all where the official code fails or miscounts: tokens and steps
include `accumulate_grad_batches`; lr_init = 0 together with exit tokens, and a weight-decay schedule beside a constant
learning rate or from 0, do not raise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rwkv_nb.training.config import NEVER

if TYPE_CHECKING:
    from rwkv_nb.training.config import TrainConfig


def real_step(step: int, cfg: TrainConfig) -> int:
    """Optimizer steps since the very beginning, resumed runs included."""
    return step + cfg.epoch_begin * cfg.steps_per_epoch


def real_tokens(step: int, cfg: TrainConfig) -> int:
    """Tokens trained on, over all devices, before this step."""
    return real_step(step, cfg) * cfg.tokens_per_step


def exit_reached(step: int, cfg: TrainConfig) -> bool:
    """Whether my_exit_tokens have been trained on before this step: then it is not to be taken."""
    return cfg.my_exit_tokens != 0 and real_tokens(step, cfg) >= abs(cfg.my_exit_tokens)


def last_step(cfg: TrainConfig) -> int | None:
    """The step before which the run ends, counted from the (re)start; None without my_exit_tokens and my_exit."""
    ends = []
    if cfg.my_exit_tokens != 0:
        ends.append(-(-(abs(cfg.my_exit_tokens) - real_tokens(0, cfg)) // cfg.tokens_per_step))
    if cfg.my_exit < NEVER:
        ends.append((cfg.my_exit + 1 - cfg.epoch_begin) * cfg.steps_per_epoch)
    return max(0, min(ends)) if ends else None


def progress(step: int, cfg: TrainConfig) -> float:
    """How much of the decay is done, in [0, 1]: by tokens if my_exit_tokens is given, else by mini-epochs."""
    return _progress_tokens(step, cfg) if cfg.my_exit_tokens != 0 else _progress_epochs(step, cfg)


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """The learning rate of a group with my_lr_scale = 1 at this step, counted from the (re)start."""
    lr = _lr_by_epochs(step, cfg)
    if cfg.my_exit_tokens != 0:
        wave = math.cos(math.pi * _progress_tokens(step, cfg))
        # lr_init * ((1 + q) / 2 + (1 - q) / 2 * wave) with q = lr_final / lr_init, without the division by lr_init
        cosine = (cfg.lr_init + cfg.lr_final) / 2 + (cfg.lr_init - cfg.lr_final) / 2 * wave
        lr = cosine if cfg.my_exit_tokens > 0 else (lr + cosine) / 2
    if step < cfg.warmup_steps:
        start = 0.2 if cfg.recipe == "seed" else 0.01
        lr *= start + (1 - start) * step / cfg.warmup_steps
    return lr


def weight_decay(step: int, cfg: TrainConfig) -> float:
    """The decay of the groups that are decayed, at this step."""
    if cfg.weight_decay_final <= 0 or cfg.weight_decay <= 0:
        return cfg.weight_decay
    return cfg.weight_decay * math.exp(math.log(cfg.weight_decay_final / cfg.weight_decay) * progress(step, cfg))


def _lr_by_epochs(step: int, cfg: TrainConfig) -> float:
    if cfg.lr_final == cfg.lr_init or cfg.epoch_count == 0:
        return cfg.lr_init
    done = _progress_epochs(step, cfg)
    if cfg.lr_final == 0 or cfg.lr_init == 0:  # nothing exponential starts from or ends at 0
        return cfg.lr_init + (cfg.lr_final - cfg.lr_init) * done
    return cfg.lr_init * math.exp(math.log(cfg.lr_final / cfg.lr_init) * done)


def _progress_epochs(step: int, cfg: TrainConfig) -> float:
    if cfg.epoch_count == 0:
        return 0.0
    done = real_step(step, cfg) - cfg.my_pile_edecay * cfg.steps_per_epoch - cfg.warmup_steps + 1
    return _ratio(done, (cfg.epoch_count - cfg.my_pile_edecay) * cfg.steps_per_epoch - cfg.warmup_steps)


def _progress_tokens(step: int, cfg: TrainConfig) -> float:
    warmup = cfg.warmup_steps * cfg.tokens_per_step
    return _ratio(real_tokens(step, cfg) - warmup, abs(cfg.my_exit_tokens) - warmup)


def _ratio(done: int, total: int) -> float:
    """done / total clipped to [0, 1]; where nothing is left to decay, 1 as soon as the end is reached."""
    if total <= 0:
        return 1.0 if done >= total else 0.0
    return min(1.0, max(0.0, done / total))
