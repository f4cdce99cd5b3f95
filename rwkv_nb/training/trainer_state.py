"""What a run needs, beside its weights file, to go on as if it had never stopped.

It is: a TrainerState, taken from a run, written to a file and put back into a run: weights in float32, Adam's moments,
the position in the run, every generator of random numbers, the loss scale. On a CPU a run that goes on from it is the
uninterrupted run, bit for bit. It is not: the choice of the file to go on from (resume.py), nor the putting together of
a model that a strategy has cut into pieces (whole_state.py).

Names in a project folder, which the official trainer and the `rwkv` package pass over, as they do not end in .pth:
    rwkv-N.state      after mini-epoch N, beside rwkv-N.pth
    rwkv-N.B.state    within mini-epoch N, after B of its batches
A state has the weights itself, because rwkv-N.pth may hold them rounded to bfloat16 or float16. It belongs to a .pth
file if its weights, rounded likewise, are those of the file.
The optimizer's tensors go by the names of the parameters, so that another order of groups does not mix them up.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_nb.model.weights import strip_prefix
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import CheckpointError, read_tensors, write_tensors

FORMAT = 1  # of the file; to be raised when an older program could not read a newer file rightly
# flags that say which samples a step sees and how many it has: with others the position means something else
SAME_FLAGS = (
    "data_type", "vocab_size", "ctx_len", "magic_prime", "my_pile_version", "my_pile_stage", "my_pile_shift",
    "my_qa_mask", "my_random_steps", "my_sample_len", "random_seed", "micro_bsz", "devices", "num_nodes",
    "epoch_steps", "accumulate_grad_batches", "n_layer", "n_embd", "dim_att", "dim_ffn", "head_size_a",
    "head_size_divisor", "pre_ffn", "head_qk", "tiny_att_dim", "tiny_att_layer", "my_pos_emb", "my_testing",
    "val_split",
)  # fmt: skip
# a change is nobody's business
UNSAID_FLAGS = ("load_model", "proj_dir", "epoch_begin", "warmup_steps", "resume", "wandb", "logger",
                "enable_progress_bar", "save_state", "save_minutes", "save_steps")  # fmt: skip


@dataclass
class TrainerState:
    """A run at the end of an optimizer step.

    epoch: number of the mini-epoch at hand, over restarts. batch: how many of its batches each device has done.
    step: optimizer steps since the run began with weights alone, at mini-epoch epoch_begin. ranks: for each process
    the sum of the losses in this mini-epoch, and its random numbers. checkpoint: the file that is to hold these weights
    too, or "". log_line: the line of train_log.txt that belongs to the end of this mini-epoch, or "".
    """

    epoch: int
    batch: int
    step: int
    epoch_begin: int
    warmup_steps: int
    flags: dict[str, Any]
    n_tokens: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, Any]]
    scaler: dict[str, Any]
    ranks: list[dict[str, Any]]
    checkpoint: str = ""
    log_line: str = ""
    format: int = field(default=FORMAT)

    def save(self, path: str | os.PathLike) -> Path:
        """Write it whole or not at all. Raises OSError."""
        return write_tensors({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TrainerState:
        """Raises FileNotFoundError, or CheckpointError for a file that is damaged, holds code, or is no such state."""
        content = read_tensors(path)
        wrong = _what_is_wrong(content)
        if wrong:
            raise CheckpointError(f"{path}: no trainer state that can be used here ({wrong}); delete it")
        return cls(**content)

    def misfit(self, cfg: TrainConfig, n_tokens: int) -> str:
        """Why a run of `cfg` on `n_tokens` tokens cannot go on from here; empty if it can."""
        now = cfg.flags()
        differ = [f"{name}={now[name]}, it was {self.flags[name]}" for name in SAME_FLAGS
                  if name in self.flags and name in now and self.flags[name] != now[name]]  # fmt: skip
        if n_tokens != self.n_tokens:
            differ.append(f"the data has {n_tokens} tokens, it had {self.n_tokens}")
        if len(self.ranks) != cfg.devices * cfg.num_nodes:
            differ.append(f"{cfg.devices * cfg.num_nodes} processes, it was {len(self.ranks)}")
        return "; ".join(differ)

    def changed_flags(self, cfg: TrainConfig) -> list[str]:
        """Flags that differ from those of the state and may: the schedule, for one. "name: before -> now"."""
        now, unsaid = cfg.flags(), {*SAME_FLAGS, *UNSAID_FLAGS}
        return [f"{name}: {value} -> {now[name]}" for name, value in self.flags.items()
                if name in now and name not in unsaid and value != now[name]]  # fmt: skip

    def belongs_to(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether a checkpoint's weights are these, rounded to its dtype; bit by bit, so that nan equals nan.

        Of zeros the sign does not matter: DeepSpeed loses it when it adds pieces up.
        """
        if weights.keys() != self.weights.keys():
            return False
        pairs = ((self.weights[name].to(tensor.dtype), tensor) for name, tensor in weights.items())
        return all(a.shape == b.shape and torch.equal(_bytes(a + 0), _bytes(b + 0)) for a, b in pairs)


def optimizer_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Name of the parameter -> what the optimizer remembers of it, tensors on the CPU."""
    names, remembered = _names(optimizer, model), optimizer.state_dict()["state"]
    return {names[i]: {k: alone(v) if isinstance(v, torch.Tensor) else v for k, v in entry.items()}
            for i, entry in remembered.items()}  # fmt: skip


def restore_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module, saved: dict[str, dict]) -> None:
    """The reverse; groups and rates stay those of `optimizer`."""
    content, names = optimizer.state_dict(), _names(optimizer, model)
    content["state"] = {i: dict(saved[name]) for i, name in enumerate(names) if name in saved}
    optimizer.load_state_dict(content)


def model_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Official name -> float32 tensor on the CPU, each with memory of its own."""
    return {strip_prefix(name): alone(tensor.float()) for name, tensor in weights.items()}


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Where the generators of Python, numpy and torch stand, in values that a file may hold."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put the generators where they stood."""
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _python_state(state: Mapping[str, Any]) -> tuple:
    words, gauss = state["python"]
    return (3, tuple(words.tolist()), gauss)


def _numpy_state(state: Mapping[str, Any]) -> tuple:
    keys, *rest = state["numpy"]
    return ("MT19937", keys.numpy().astype(np.uint32), *rest)


def _names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """Official names of the parameters in the order of the optimizer's state_dict."""
    names = {id(parameter): strip_prefix(name) for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; a view is copied, because torch.save writes all the memory behind a tensor."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _what_is_wrong(content: Any) -> str:
    """Why the content of a file is no TrainerState; empty if it is one, which can be put back without an error."""
    if not isinstance(content, dict) or "format" not in content:
        return f"it holds a {type(content).__name__} of something else"
    if content["format"] != FORMAT:
        return f"its format is {content['format']!r}, this program reads {FORMAT}"
    kinds = {f.name: f.type for f in dataclasses.fields(TrainerState)}
    if content.keys() != kinds.keys():
        return f"fields are missing or foreign: {', '.join(sorted(map(str, content.keys() ^ kinds.keys())))}"
    for name, kind in kinds.items():
        wanted = {"int": int, "str": str}.get(kind, list if kind.startswith("list") else dict)
        if not isinstance(content[name], wanted) or (wanted is int and content[name] < -1):
            return f"{name} is {str(content[name])[:40]!r}"
    weights, optimizer = content["weights"], content["optimizer"]
    if not all(isinstance(w, torch.Tensor) and w.dtype == torch.float32 for w in weights.values()):
        return "weights are not float32 tensors"
    for name, entry in optimizer.items():
        if name not in weights or not isinstance(entry, dict):
            return f"the optimizer has {name!r}, the model has not"
        if any(isinstance(v, torch.Tensor) and v.dim() and v.shape != weights[name].shape for v in entry.values()):
            return f"the optimizer's tensors of {name!r} have another shape"
    return _wrong_ranks(content["ranks"])


def _wrong_ranks(ranks: list) -> str:
    try:
        for rank in ranks:
            float(rank["loss_sum"])
            random.Random().setstate(_python_state(rank["random"]))
            np.random.RandomState().set_state(_numpy_state(rank["random"]))
            torch.Generator().set_state(rank["random"]["torch"])
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        return f"random numbers: {error}"
    return "" if ranks else "no process"
