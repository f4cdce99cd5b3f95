"""torch.compile for the blocks of a model, while it trains.

It is: the flag `compile`, and the question whether this machine has what it needs. It is not: needed for anything.
Block by block, so that all blocks share one compiled program, grad_cp works as ever and names of weights stay the same.
Under it the definitions in `model/fused.py` run in place of our kernels, WKV-5 stays the operator that it is, and the
results differ in the last digits. Shapes are fixed: a run that is resumed compiles what the run before it compiled.

Imports no torch at the top: preflight.py asks before anything is loaded.
Source: PyTorch's documentation of `nn.Module.compile`; what it brought is in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_nb.model.rwkv import RWKV

BACKEND = "inductor"


def why_not(on_cpu: bool) -> str:
    """What torch.compile lacks here, with the remedy; "" if nothing."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(shutil.which(name) for name in (*named, "c++", "g++", "clang++", "cl")):
        return "torch.compile needs a C++ compiler, such as g++"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "torch.compile needs Python's headers, such as the package python3-dev"
    if not on_cpu and find_spec("triton") is None:
        return "torch.compile needs the package triton for a GPU"
    return ""


@contextlib.contextmanager
def compiled(model: RWKV, wanted: bool) -> Iterator[None]:
    """Within: the blocks are compiled if wanted, at their first call. After: the model is as before."""
    if wanted:
        for block in model.blocks:
            block.compile(backend=BACKEND, dynamic=False)
    try:
        yield
    finally:
        if wanted:
            for block in model.blocks:
                block._compiled_call_impl = None  # nn.Module.compile has no way back of its own
