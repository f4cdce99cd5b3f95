"""Files of weights: read them safely, compare them with what a model needs.

What it is not: saving while training, or resuming (`rwkv_nb.training.checkpoint`). A file is what `torch.save` makes
of a dictionary name -> tensor, as official `.pth` files are; nothing else in it is accepted and no code in it is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from .config import ModelConfig
from .initialization import is_mask, parameter_shapes
from .reading import CODE, DAMAGE, read_torch_file

PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.")  # of DeepSpeed, torch.compile, DDP, Lightning


def load_weights(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, Tensor]:
    """Read a `.pth` file on the CPU without running any code in it; prefixes of wrappers are removed.

    mmap: bytes are read when they are used, and need no memory of their own; the file must stay as it is meanwhile.
    Files older than torch 1.6 are read whole all the same.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds something else than named tensors.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        weights = read_torch_file(path, mmap=mmap)
    except (*CODE, *DAMAGE) as error:
        if isinstance(error, PermissionError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not readable as a file of weights ({reason}); download or save it again") from error
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path}: holds no dictionary of named tensors; give the .pth of the weights alone")
    return {strip_prefix(key): x for key, x in weights.items()}


def strip_prefix(name: str) -> str:
    """The official name of a parameter: without what wrappers put in front, or FSDP in between."""
    name = name.replace("_fsdp_wrapped_module.", "")
    while True:
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        else:
            return name


def check_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with what the configuration needs.

    Masks may be missing or of another ctx_len: the model makes its own.

    Raises:
        ValueError: names the missing keys, the foreign keys or the first wrong shape.
    """
    shapes = parameter_shapes(config)
    problems = []
    for label, keys in (
        ("missing", [k for k in shapes if k not in weights and not is_mask(k)]),
        ("unknown", [k for k in weights if k not in shapes]),
    ):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{label} keys: {', '.join(keys[:4])}{more}")
    wrong = [k for k in shapes if k in weights and not is_mask(k) and tuple(weights[k].shape) != shapes[k]]
    if wrong:
        k = wrong[0]
        sizes = f"n_layer = {config.n_layer}, n_embd = {config.n_embd}, vocab_size = {config.vocab_size}"
        problems.append(f"{k} has shape {tuple(weights[k].shape)}, expected {shapes[k]} for {sizes}")
    whole = [k for k in shapes if k in weights and not is_mask(k) and not weights[k].is_floating_point()]
    if whole:
        problems.append(f"{whole[0]} holds {str(weights[whole[0]].dtype).removeprefix('torch.')}, not decimal numbers")
    if problems:
        raise ValueError("the weights do not fit the model; " + "; ".join(problems))
