"""Which parameters learn how fast, which are decayed, and the Adam that does it.

It is: the official parameter groups and the choice between Adam and AdamW. It is not: a schedule (see schedule.py),
which says what `lr` and `weight_decay` of these groups are at every step.

Symbols: my_lr_scale multiplies the learning rate of a group. Groups, in order: 1x, 2x, 3x, decay.
    time_mix*, time_faaaa   1x, in stage 2: 2x          time_decay    2x, in stage 2: 3x
    time_first              3x (RWKV-5.2 has none)      matrices      decay if weight_decay > 0, else 1x
    all others              1x                          scales        1, 2, 3; in stage 2: 1, 5, 5
With layerwise_lr = 0 there is one group, and decay. Recipe "head" decays only names with ".weight", so never a time_*.
Source: `configure_optimizers` in RWKV-LM `RWKV-v5/src/model.py`, where DeepSpeed's FusedAdam does the same arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rwkv_nb.model.initialization import parameter_shapes
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.weights import strip_prefix
from rwkv_nb.training.config import TrainConfig


def group_of(name: str, parameter: torch.Tensor, cfg: TrainConfig) -> str:
    """The group ("1x", "2x", "3x" or "decay") of a parameter, by its official name and its dimensions above 1."""
    if cfg.layerwise_lr > 0:
        warming = cfg.my_pile_stage == 2
        if "time_mix" in name or "time_faaaa" in name:
            return "2x" if warming else "1x"
        if "time_decay" in name:
            return "3x" if warming else "2x"
        if "time_first" in name:
            return "3x"
    is_matrix = parameter.squeeze().dim() >= 2
    if cfg.weight_decay > 0 and is_matrix and (cfg.recipe == "seed" or ".weight" in name):
        return "decay"
    return "1x"


def param_groups(model: nn.Module, cfg: TrainConfig) -> list[dict[str, Any]]:
    """Every parameter of `model` once: dicts with params (sorted by name), weight_decay, my_lr_scale and name.

    FSDP has cut an RWKV into flat pieces before: the shapes are those that the whole model has.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"1x": [], "2x": [], "3x": [], "decay": []}
    shapes = parameter_shapes(model.config) if isinstance(model, RWKV) else {}
    for long, parameter in sorted(model.named_parameters()):
        name = strip_prefix(long)
        whole = torch.empty(shapes.get(name, parameter.shape), device="meta")
        members[group_of(name, whole, cfg)].append((name, parameter))
    scales = {"1x": 1.0, "2x": 5.0, "3x": 5.0} if cfg.my_pile_stage == 2 else {"1x": 1.0, "2x": 2.0, "3x": 3.0}
    kinds = (["1x", "2x", "3x"] if cfg.layerwise_lr > 0 else ["1x"]) + (["decay"] if cfg.weight_decay > 0 else [])
    return [
        {
            "params": [parameter for _, parameter in members[kind]],
            "weight_decay": cfg.weight_decay if kind == "decay" else 0.0,
            "my_lr_scale": scales.get(kind, 1.0),
            "name": kind,
        }
        for kind in kinds
    ]


def build_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """AdamW if weight_decay > 0, else Adam; one fused kernel for all parameters where torch has it.

    With precision fp16 it is not fused: a fused step divides out the loss scale by itself, after the clipping, which
    needs true gradients.
    """
    kind = torch.optim.AdamW if cfg.weight_decay > 0 else torch.optim.Adam
    fused = cfg.precision != "fp16" and all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return kind(
        param_groups(model, cfg), lr=cfg.lr_init, betas=cfg.betas, eps=cfg.adam_eps, weight_decay=0.0, fused=fused
    )


def set_rates(optimizer: torch.optim.Optimizer, cfg: TrainConfig, lr: float, decay: float) -> None:
    """Give every group its learning rate and its weight decay for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["my_lr_scale"] if cfg.layerwise_lr > 0 else lr
        if group["name"] == "decay":
            group["weight_decay"] = decay
