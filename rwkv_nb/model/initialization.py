"""The weights that an RWKV-5.2 model starts from, as the official trainer makes them.

What it is not: the resizing of another model's weights. Two recipes, which differ only in scales:

    "seed"   the trainer of December 2023: embedding uniform in +-lr_init, every non-square orthogonal matrix scaled up
    "head"   the trainer since April 2024: embedding in +-1e-4, `att.key` and `att.gate` scaled by 0.1

Symbols: i layer, L layers, rho = i/(L-1) (0 when there is one layer), kappa = 1 - i/L, c = channel/D, n = channel
of time mixing, A their number. The matrices that write to the residual stream start at zero, so that each block
starts as the identity. Source: `generate_init_weight` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig

RECIPES = ("head", "seed")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of official checkpoints."""
    V, D, A, F = config.vocab_size, config.n_embd, config.dim_att, config.dim_ffn
    heads = (config.n_head, config.head_size_a)
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (V, D)}
    for i in range(config.n_layer):
        norms = ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2")
        block = {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
        block |= {f"att.time_mix_{name}": (1, 1, D) for name in "kvrg"}
        block |= {"att.time_decay": heads, "att.time_faaaa": heads}
        block |= {f"att.{name}.weight": (A, D) for name in ("receptance", "key", "value")}
        block |= {"att.output.weight": (D, A), "att.gate.weight": (A, D)}
        block |= {"att.ln_x.weight": (A,), "att.ln_x.bias": (A,)}
        block |= {"ffn.time_mix_k": (1, 1, D), "ffn.time_mix_r": (1, 1, D)}
        block |= {"ffn.key.weight": (F, D), "ffn.receptance.weight": (D, D), "ffn.value.weight": (D, F)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_out.weight": (D,), "ln_out.bias": (D,), "head.weight": (V, D)}


def init_weights(
    config: ModelConfig, seed: int | None = None, recipe: str = "head", lr_init: float = 6e-4
) -> dict[str, Tensor]:
    """Initial weights: name -> float32 tensor, in the order of official checkpoints.

    Args:
        seed: the same seed gives the same weights; None draws from torch's global generator.
        recipe: "head" or "seed", see above.
        lr_init: only recipe "seed" uses it: the range of the embedding.

    Raises:
        ValueError: unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"init_weights: recipe = {recipe!r} is unknown; choose from {', '.join(RECIPES)}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if name == "emb.weight":
            limit = 1e-4 if recipe == "head" else lr_init
            weights[name] = torch.empty(shape).uniform_(-limit, limit, generator=generator)
        elif len(shape) == 2 and name.endswith(".weight"):
            scale = _matrix_scale(name, shape, recipe)
            weights[name] = _orthogonal(shape, scale, generator) if scale else torch.zeros(shape)
        else:
            weights[name] = _vector(name, shape, config)
    return weights


def _matrix_scale(name: str, shape: tuple[int, ...], recipe: str) -> float:
    """What the orthogonal matrix of this name is multiplied by; 0: all zeros."""
    rows, columns = shape
    tall = math.sqrt(rows / columns) if rows > columns else 1.0
    if name.endswith(("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")):
        return 0.0
    if name == "head.weight":
        return 0.5 * tall
    if recipe == "seed":
        return tall
    return 0.1 if name.endswith(("att.key.weight", "att.gate.weight")) else 1.0


def _orthogonal(shape: tuple[int, ...], scale: float, generator: torch.Generator | None) -> Tensor:
    """A random matrix with orthonormal rows or columns (whichever are fewer), times scale."""
    rows, columns = max(shape), min(shape)
    x = torch.empty(rows, columns).normal_(generator=generator)
    if rows >= 4 * columns:
        # Q = X R^-1 with R from Cholesky's X^T X = R^T R: the same Q as a QR decomposition (R's diagonal positive),
        # and safe for so tall a matrix, whose columns are nearly orthogonal to begin with. Several times faster.
        gram = (x.T @ x).double()
        inverse = torch.linalg.solve_triangular(
            torch.linalg.cholesky(gram, upper=True), torch.eye(columns).double(), upper=True
        )
        q = x @ (inverse * scale).float()
    else:
        q, r = torch.linalg.qr(x)
        q *= torch.where(r.diagonal() < 0, -scale, scale)
    return (q if shape == (rows, columns) else q.T).contiguous()


def _vector(name: str, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
    """Everything that is no matrix product: norms, mixes, decay, bonus."""
    part = name.split(".", 2)[-1]
    if part.endswith(".bias") or name == "ln_out.bias":
        return torch.zeros(shape)
    if not part.startswith(("att.", "ffn.")):
        return torch.ones(shape)  # layer norms
    i = int(name.split(".")[1])
    rho = i / (config.n_layer - 1) if config.n_layer > 1 else 0.0  # 0 in the first layer to 1 in the last
    kappa = 1.0 - i / config.n_layer  # 1 to almost 0
    if part == "att.ln_x.weight":
        return torch.full(shape, ((1 + i) / config.n_layer) ** 0.7)
    if "time_mix_" in part:
        c = torch.arange(config.n_embd, dtype=torch.float64) / config.n_embd
        power = kappa / 2 if part in ("att.time_mix_r", "att.time_mix_g") else kappa
        mix = c**power + (0.3 * rho if part == "att.time_mix_v" else 0.0)
        return mix.float().view(shape)
    n = torch.arange(config.dim_att, dtype=torch.float64)
    along = n / (config.dim_att - 1)
    if part == "att.time_decay":
        return (-6 + 5 * along ** (0.7 + 1.3 * rho)).float().view(shape)
    if part == "att.time_faaaa":
        return (rho * (1 - along) + ((n + 1) % 3 - 1) * 0.1).float().view(shape)
    raise KeyError(f"no initial value is defined for {name}")
