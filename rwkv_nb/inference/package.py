"""The `rwkv` package behind the call of our own model: split, streamed and quantised strategies.

    engine = PackageEngine(path, parse_strategy("cuda fp16i8 *10 -> cpu fp32", 32), config)
    logits, state = engine(idx, state)

Two environment variables are read when the package is imported, so set them before, as its own examples do:

    RWKV_JIT_ON     anything but 0 (the default): its functions become TorchScript
    RWKV_CUDA_ON    1: its CUDA kernels are compiled; "10x faster" prompts on a GPU. Needs nvcc, a C++ compiler, ninja

What it is not: the reader of strategies (`strategy.py`), or the choice between engines (`engine.py`).
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
import sys
import types

import torch
from torch import Tensor

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.wkv import build

from .strategy import Plan


class PackageEngine:
    """The `rwkv` package, called like an RWKV.

    Rows of a batch are worked off one after the other: the package knows no batches.

    Raises:
        ValueError: one layer only, or the package's switches ask for what this machine lacks.
    """

    training = False

    def __init__(self, path: str | os.PathLike, plan: Plan, config: ModelConfig):
        if config.n_layer < 2:
            raise ValueError(f"{path}: has n_layer = 1, which the `rwkv` package cannot load; use 'cpu fp32'")
        package = import_package()
        self.config, self.plan = config, plan
        self.package = _load(package, str(path).removesuffix(".pth"), plan)
        self.emb = types.SimpleNamespace(weight=self.package.w["emb.weight"])  # where callers look for the device

    def __call__(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) without full_output, and the state, batch first."""
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"PackageEngine: idx must be (B, T) with at least one token, got shape {tuple(idx.shape)}")
        rows, states = [], []
        for b, tokens in enumerate(idx.tolist()):
            own = None if state is None else [x[b].clone() for x in state]  # the package changes what it is given
            logits, own = self.package.forward(tokens, own, full_output=full_output and len(tokens) > 1)
            rows.append(logits.view(-1, self.config.vocab_size))
            states.append(own)
        return torch.stack(rows).float(), [torch.stack(parts) for parts in zip(*states, strict=True)]


def _load(package: types.ModuleType, path: str, plan: Plan):
    """The package's model. It collects garbage after each layer, seconds where much is loaded: here it finds nothing.

    Without a GPU it also prints for every streamed matrix that memory runs out, since it cannot pin it: not shown.
    """
    silent = contextlib.redirect_stdout(io.StringIO()) if plan.devices == ("cpu",) else contextlib.nullcontext()
    gc.freeze()
    try:
        with silent:
            return package.RWKV(path, plan.text, verbose=False)
    finally:
        gc.unfreeze()


def import_package() -> types.ModuleType:
    """`rwkv.model`, imported with the switches as they are set now.

    Raises ValueError if it was imported with others before, or if RWKV_CUDA_ON = 1 lacks something.
    """
    if (model := sys.modules.get("rwkv.model")) is not None:
        jit, cuda = model.MyModule is torch.jit.ScriptModule, hasattr(model, "cuda_wkv")
        for name, used in (("RWKV_JIT_ON", jit), ("RWKV_CUDA_ON", cuda)):
            if name in os.environ and _on(name) != used:
                raise ValueError(
                    f"{name} = {os.environ[name]}, but the `rwkv` package was imported with {int(used)} and reads it "
                    "only then; set it before the first model is loaded (in a notebook: restart the kernel)"
                )
        return model
    if _on("RWKV_CUDA_ON") and (missing := _lacking_for_cuda()):
        raise ValueError(
            f"RWKV_CUDA_ON = 1 compiles the `rwkv` package's CUDA kernels, but {missing} is missing; install it, or "
            "set RWKV_CUDA_ON=0"
        )
    products, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        import rwkv.model
    except (RuntimeError, OSError) as error:  # a compiler's complaint
        raise ValueError(
            f"the `rwkv` package could not be imported ({str(error).strip().splitlines()[0]}); with RWKV_CUDA_ON=0 it "
            "compiles nothing"
        ) from error
    finally:  # the package switches tf32 on, for everybody
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = cudnn
    return rwkv.model


def _on(name: str) -> bool:
    """Whether a switch is on, read as the package reads it."""
    return os.environ.get("RWKV_CUDA_ON") == "1" if name == "RWKV_CUDA_ON" else os.environ.get(name) != "0"


def _lacking_for_cuda() -> str:
    """The first thing that the package's kernels need and this machine has not; "" if there is everything."""
    if not torch.cuda.is_available():
        return "a CUDA GPU (with a torch that sees it)"
    if not build.find_nvcc():
        return "nvcc"
    if not build.find_cxx():
        return "a C++ compiler"
    return "" if shutil.which("ninja") else "ninja (pip install ninja)"
