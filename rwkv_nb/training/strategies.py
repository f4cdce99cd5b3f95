"""What Lightning's strategies ask of the code around them: equal weights at the start, true clipping, whole weights.

    auto, ddp          every process holds the whole model; nothing special is needed
    fsdp               parameters, gradients and Adam's state are cut into one piece a process; whole block by block
    deepspeed_stage_N  N = 1 cuts Adam's state, 2 the gradients too, 3 the parameters too; _offload keeps pieces in RAM

It is: the few calls in which they differ. It is not: an engine; Lightning, torch and DeepSpeed do the work.
`fsdp` and `deepspeed_*` need a GPU (Lightning and torch refuse a machine without one), `ddp` runs anywhere.
Source: RWKV-LM `RWKV-v5/train.py` (bucket sizes), `src/model.py` (DeepSpeedCPUAdam), `src/trainer.py` (saving).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from rwkv_nb.model.block import Block
from rwkv_nb.training.agreement import several_processes
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.machine import PRECISION
from rwkv_nb.training.optimizer import build_optimizer, param_groups

# How long a process waits for another one, once all have met. Lightning's 30 minutes are too short where the first
# process writes files for all: a state of 14 billion parameters is 168 GB, 2.5 hours on a disk of 20 MB/s. The price: a
# longer wait for one that hangs, or that died where no launcher ends the others (srun without --kill-on-bad-exit=1).
PATIENCE = datetime.timedelta(hours=6)


def set_up(strategy: Strategy, cfg: TrainConfig) -> None:
    """Tell a strategy how much to hold whole at once, and how to add up batches.

    Whole at once: DeepSpeed `ds_bucket_mb` million numbers, FSDP one block, and the parameters that are left over, with
    the embedding and the head, for the whole step. Batches of a step are added up in float32: DeepSpeed and FSDP would
    do it in the 16 bits in which they compute (64 equal batches: 3 % off).
    """
    if isinstance(strategy, DeepSpeedStrategy):
        zero = strategy.config.setdefault("zero_optimization", {})
        zero["allgather_bucket_size"] = zero["reduce_bucket_size"] = cfg.ds_bucket_mb * 1_000_000
        if cfg.accumulate_grad_batches > 1:
            strategy.config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif isinstance(strategy, FSDPStrategy):
        from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

        strategy.kwargs["auto_wrap_policy"] = functools.partial(lambda_auto_wrap_policy, lambda_fn=_alone)
        # Lightning would cut gradients after the last batch alone: each process held them whole, in 16 bits, till then
        strategy.block_backward_sync = contextlib.nullcontext
        if cfg.devices * cfg.num_nodes == 1:  # nothing is sent: the type of what is sent is that of the sum
            strategy.mixed_precision = dataclasses.replace(strategy.mixed_precision_config, reduce_dtype=torch.float32)


def _alone(module: torch.nn.Module) -> bool:
    """Whether FSDP gathers this module by itself. Not block 0: the model takes ln0 and pos_emb out of it."""
    return isinstance(module, Block) and not hasattr(module, "ln0")


def leaves_no_model(strategy: Strategy) -> bool:
    """Whether a run leaves pieces of a model behind, or one whose weights DeepSpeed has rounded to 16 bits."""
    return isinstance(strategy, FSDPStrategy | DeepSpeedStrategy)


def head_stays_whole(strategy: Strategy) -> bool:
    """Whether the head's weights are there for the whole step, and not only while the head itself runs."""
    return _zero_stage(strategy) != 3


def be_patient() -> None:
    """From now on wait `PATIENCE` for another process; until all have met, Lightning's half an hour is enough."""
    if several_processes():
        torch.distributed.distributed_c10d._set_pg_timeout(PATIENCE)


def same_start(strategy: Strategy, model: torch.nn.Module) -> None:
    """Give every process the weights of process 0, tensor by tensor; to be called before the strategy wraps the model.

    Without a seed each process draws weights of its own. DDP and DeepSpeed repair that themselves, FSDP would put one
    model together from pieces of different ones.
    """
    if not several_processes():
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            there = tensor.detach().to(strategy.root_device)
            torch.distributed.broadcast(there, src=0)
            tensor.copy_(there)


def cut_in_turn(strategy: Strategy, module: pl.LightningModule) -> None:
    """ZeRO stage 3: cut each parameter by itself on its way to the device; to be called after `same_start`.

    DeepSpeed would move the whole model there first, for which a device may have no room. FSDP moves block by block.
    """
    if _zero_stage(strategy) != 3:
        return
    import deepspeed

    strategy._init_config_if_needed()
    dtype = PRECISION[module.cfg.precision][1] or torch.float32
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)  # DeepSpeed rounds what is not cut yet, no more
    deepspeed.zero.Init(module=module.model, config_dict_or_path=strategy.config)
    module.to(strategy.root_device)  # what is not cut: masks; and Lightning learns where the model is


def make_optimizer(strategy: Strategy, model: torch.nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """`build_optimizer`, or DeepSpeed's Adam for processors where ZeRO keeps Adam's state in RAM."""
    zero = strategy.config.get("zero_optimization", {}) if isinstance(strategy, DeepSpeedStrategy) else {}
    if zero.get("offload_optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use

        return DeepSpeedCPUAdam(
            param_groups(model, cfg), lr=cfg.lr_init, betas=cfg.betas, eps=cfg.adam_eps,
            adamw_mode=cfg.weight_decay > 0, weight_decay=0.0,
        )  # fmt: skip
    return build_optimizer(model, cfg)


def loss_to_divide(strategy: Strategy, loss: torch.Tensor, cfg: TrainConfig) -> torch.Tensor:
    """What training_step returns: Lightning divides it by the batches of a step, and DeepSpeed does so once more."""
    return loss * cfg.accumulate_grad_batches if isinstance(strategy, DeepSpeedStrategy) else loss


def clip_gradients(strategy: Strategy, module: torch.nn.Module, max_norm: float | None) -> None:
    """Scale all gradients together down to a norm of max_norm, if theirs is larger; None or 0: leave them."""
    if not max_norm or isinstance(strategy, DeepSpeedStrategy):  # DeepSpeed clips in its own step
        return
    if isinstance(strategy, FSDPStrategy):  # each process sees a piece: the wrapper adds the squares of all
        strategy.model.clip_grad_norm_(max_norm)
    else:
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)


def full_weights(strategy: Strategy, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> whole tensor. Where parameters are cut, every process must call this, and only process 0 gets them."""
    if isinstance(strategy, FSDPStrategy):
        return strategy.lightning_module_state_dict()
    if _zero_stage(strategy) == 3:
        import deepspeed

        weights = saved_buffers(model)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if strategy.is_global_zero:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights
    return model.state_dict()


def saved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> what a checkpoint holds besides parameters (masks), on the CPU; no strategy cuts them."""
    saved = model.state_dict().keys()
    return {name: tensor.to("cpu", copy=True) for name, tensor in model.named_buffers() if name in saved}


def _zero_stage(strategy: Any) -> int:
    config = strategy.config if isinstance(strategy, DeepSpeedStrategy) else {}
    return config.get("zero_optimization", {}).get("stage", 0)
