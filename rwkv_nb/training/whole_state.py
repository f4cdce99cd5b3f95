"""Weights and Adam's moments as whole tensors, whatever a strategy has made of them: taken out, and put back.

It is: functions that every process calls. A run that cuts nothing gives a copy; the pieces of fsdp and DeepSpeed are
put together in the RAM of the first process (12 bytes a parameter), so that one file holds the state of any run and
another strategy, with as many processes, can go on from it. DeepSpeed's come one parameter at a time, FSDP's what it
gathers at a time: embedding, head and block 0, and another block. It is not: the file (trainer_state.py), nor the
folders of pieces that torch and DeepSpeed can write, which fit the same strategy alone and, DeepSpeed's, hold pickled
code.

Source: torch.distributed.fsdp; `safe_get_full_...` of deepspeed/utils/tensor_fragment.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy, Strategy

from rwkv_nb.model.weights import strip_prefix
from rwkv_nb.training.strategies import saved_buffers
from rwkv_nb.training.trainer_state import alone, model_weights, optimizer_state, restore_optimizer

Entries = dict[str, dict[str, Any]]  # official name of a parameter -> step, exp_avg, exp_avg_sq
MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of DeepSpeed's DynamicLossScaler


def can_be_whole(strategy: Strategy) -> bool:
    """Whether the functions below know this strategy; not one that keeps the optimizer on a disk."""
    if isinstance(strategy, DeepSpeedStrategy):
        zero = strategy.config.get("zero_optimization", {})
        return zero.get("stage", 0) in (1, 2, 3) and (zero.get("offload_optimizer") or {}).get("device") != "nvme"
    return isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy)


def whole_state(trainer: pl.Trainer, model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], Entries]:
    """(weights in float32, what Adam remembers), by official names, on the CPU; empty but for the first process."""
    strategy, optimizer = trainer.strategy, trainer.optimizers[0]
    if isinstance(strategy, DeepSpeedStrategy):
        return _collect(optimizer, model, trainer.is_global_zero)
    if isinstance(strategy, FSDPStrategy):
        with _whole_fsdp(strategy.model, rank0_only=True):
            found = strategy.model.optim_state_dict(strategy.model, optimizer).get("state", {})
        weights = strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return {}, {}
        entries = {strip_prefix(name): {k: alone(v) for k, v in entry.items()} for name, entry in found.items()}
        return model_weights(weights), entries
    if not trainer.is_global_zero:
        return {}, {}
    return model_weights(model.state_dict()), optimizer_state(optimizer, model)


def restore_whole(
    trainer: pl.Trainer, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], saved: Entries
) -> None:
    """Put a state back. Every process has all of it, and `model` began with these weights."""
    strategy, optimizer = trainer.strategy, trainer.optimizers[0]
    if isinstance(strategy, DeepSpeedStrategy):
        _distribute(optimizer, model, weights, saved)
    elif isinstance(strategy, FSDPStrategy):
        model = strategy.model
        long = {id(p): name.replace("_fsdp_wrapped_module.", "") for name, p in model.named_parameters()}
        groups = [{**group, "params": [long[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        state = {name: saved[strip_prefix(name)] for name in long.values() if strip_prefix(name) in saved}
        with _whole_fsdp(model, rank0_only=False):
            content = {"state": state, "param_groups": groups}
            optimizer.load_state_dict(model.optim_state_dict_to_load(model, optimizer, content))
    else:
        restore_optimizer(optimizer, model, saved)


def loss_scale(trainer: pl.Trainer) -> dict[str, Any]:
    """What fp16's loss scale has learnt; empty with another precision."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        scaler = getattr(trainer.optimizers[0], "loss_scaler", None)  # stage 1 that collects batches in bf16 has none
        return {name: getattr(scaler, name) for name in _SCALER} if scaler is not None and scaler.dynamic else {}
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.state_dict() if scaler is not None else {}


def restore_loss_scale(trainer: pl.Trainer, saved: Mapping[str, Any]) -> None:
    """Put it back, unless it is that of another kind of strategy, which begins anew."""
    if not saved or saved.keys() != loss_scale(trainer).keys():
        return
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        for name, value in saved.items():
            setattr(trainer.optimizers[0].loss_scaler, name, value)
    else:
        trainer.precision_plugin.scaler.load_state_dict(dict(saved))


@contextlib.contextmanager
def _whole_fsdp(model: Any, rank0_only: bool) -> Iterator[None]:
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP.state_dict_type", FutureWarning)  # what it names fails at empty groups
        cut = model.sharding_strategy.name != "NO_SHARD"  # as with one device
        with model.state_dict_type(
            model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=cut, rank0_only=rank0_only),
            FullOptimStateDictConfig(offload_to_cpu=cut, rank0_only=rank0_only),
        ):  # fmt: skip
            yield


def _collect(zero: Any, model: torch.nn.Module, first: bool) -> tuple[dict[str, torch.Tensor], Entries]:
    """From DeepSpeed's optimizer, which holds a float32 copy of the weights and the moments, a part in each process."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = [entry["step"] for entry in zero.optimizer.state.values() if "step" in entry]  # none before the first step
    if steps:
        _link(zero)
    weights, entries = model_weights(saved_buffers(model)) if first else {}, {}
    for long, parameter in model.named_parameters():
        name, entry = strip_prefix(long), {}
        weight = safe_get_full_fp32_param(parameter)
        for key in MOMENTS if steps else ():
            whole = safe_get_full_optimizer_state(parameter, key)
            entry[key] = alone(whole) if first else None
        if first:
            weights[name] = alone(weight)
            if steps:
                entries[name] = {"step": torch.tensor(float(steps[0])), **entry}
    return weights, entries


def _distribute(zero: Any, model: torch.nn.Module, weights: Mapping[str, torch.Tensor], saved: Entries) -> None:
    """To DeepSpeed's optimizer. Its float32 weights were made from rounded ones: these replace them."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if saved:
        _make_room(zero, max(float(entry["step"]) for entry in saved.values()))
    for long, parameter in model.named_parameters():
        name, local = strip_prefix(long), hasattr(parameter, "ds_id")  # of stage 3: a process sees its piece alone
        set_weight = safe_set_local_fp32_param if local else safe_set_full_fp32_param
        set_moment = safe_set_local_optimizer_state if local else safe_set_full_optimizer_state
        set_weight(parameter, _piece(parameter, weights[name]) if local else weights[name])
        for key in MOMENTS if name in saved else ():
            moment = saved[name][key]
            set_moment(parameter, _piece(parameter, moment) if local else moment, key)


def _make_room(zero: Any, step: float) -> None:
    """Give Adam, which has not stepped yet, moments of zero after `step` steps."""
    adam = zero.optimizer
    of_torch = isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
    for flat in _flat_weights(zero):
        on = flat.device if adam.defaults.get("fused") else "cpu"
        count = torch.tensor(step, device=on) if of_torch else int(step)  # DeepSpeedCPUAdam counts in int
        adam.state[flat].update({"step": count, **{key: torch.zeros_like(flat.data) for key in MOMENTS}})
    _link(zero)


def _link(zero: Any) -> None:
    """Tell each parameter of stages 1 and 2 where its moments are. DeepSpeed does it after the first step of the first
    group, when the other groups have none yet, and never again."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        if not hasattr(zero, "_hp_optimizer_states_linked"):
            raise _unknown_deepspeed()
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _flat_weights(zero: Any) -> Iterable[torch.Tensor]:
    # stage 3; stages 1 and 2; stage 1 where it collects batches in bf16
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return getattr(zero, name)
    raise _unknown_deepspeed()


def _unknown_deepspeed() -> RuntimeError:
    import deepspeed

    return RuntimeError(f"DeepSpeed {deepspeed.__version__} keeps its weights in another way; use the version in "
                        "constraints.txt, or save_state=False and resume=weights")  # fmt: skip


def _piece(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's piece of a whole tensor: equal pieces, the last filled up with zeros."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    part = value.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))
