"""The weights that an RWKV-5.2 model starts from, as the official trainer makes them.

What it is not: the resizing of another model's weights (`growing.py`). Two recipes, which differ only in scales:

    "seed"   the trainer of December 2023: embedding uniform in +-lr_init, every non-square orthogonal matrix scaled up
    "head"   the trainer since April 2024: embedding in +-1e-4, `att.key` and `att.gate` scaled by 0.1

Symbols: i layer, L layers, rho = i/(L-1) (0 when there is one layer), kappa = 1 - i/L, c = channel/D, n = channel
of time mixing, A their number. The matrices that write to the residual stream start at zero, so that each block
starts as the identity; head_qk and the position embedding start without effect. The official code takes the layer norm
of tiny attention for a matrix and stops with an error; here it gets the ones and zeros of a layer norm.

Source: `generate_init_weight` in RWKV-LM, RWKV-v5/src/model.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig

RECIPES = ("head", "seed")
_ZERO = tuple(
    f"{part}.weight" for part in ("att.output", "ffn.value", "ffn.receptance", "ffnPre.value", "ffnPre.receptance")
)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, and of the masks that head_qk and tiny_att bring along, in official order.

    The order is torch's: of each module its own parameters, its masks, then its parts as they were made.
    """
    V, D, A, F = config.vocab_size, config.n_embd, config.dim_att, config.dim_ffn
    heads = (config.n_head, config.head_size_a)
    mask, mixes = (config.ctx_len, config.ctx_len), {"time_mix_k": (1, 1, D), "time_mix_r": (1, 1, D)}
    channel_mix = mixes | {"key.weight": (F, D), "receptance.weight": (D, D), "value.weight": (D, F)}
    mish_glu = mixes | {"aa.weight": (F, D), "bb.weight": (F, D), "value.weight": (D, F)}
    time_mix = {f"time_mix_{name}": (1, 1, D) for name in "kvrg"}
    time_mix |= {"time_decay": heads, "time_faaaa": heads}
    time_mix |= {f"{name}.weight": (A, D) for name in ("receptance", "key", "value")}
    time_mix |= {"output.weight": (D, A), "gate.weight": (A, D), "ln_x.weight": (A,), "ln_x.bias": (A,)}

    shapes: dict[str, tuple[int, ...]] = {"copy_mask": mask} if config.head_qk else {}
    shapes["emb.weight"] = (V, D)
    for i in range(config.n_layer):
        n, d = (config.my_pos_emb if i == 0 else 0), (config.tiny_att_dim if i == config.tiny_att_layer else 0)
        block = {"pos_emb_x": (1, n, D), "pos_emb_y": (n, 1, D)} if n else {}
        block |= {"tiny_mask": mask} if d else {}
        norms = ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2")
        block |= {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
        first = ("ffnPre", channel_mix) if i == 0 and config.pre_ffn else ("att", time_mix)
        second = ("ffn", mish_glu if config.my_testing == "g" else channel_mix)
        block |= {f"{part}.{name}": shape for part, layer in (first, second) for name, shape in layer.items()}
        if d:
            block |= {"tiny_ln.weight": (D,), "tiny_ln.bias": (D,)}
            block |= {"tiny_q.weight": (d, D), "tiny_k.weight": (d, D), "tiny_v.weight": (D, D)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_out.weight": (D,), "ln_out.bias": (D,), "head.weight": (V, D)}
    return shapes | ({f"head_{x}.weight": (config.head_qk, D) for x in "qk"} if config.head_qk else {})


def is_mask(name: str) -> bool:
    """Whether a name in a checkpoint is a causal mask, which follows from ctx_len and is not trained."""
    return name == "copy_mask" or name.endswith(".tiny_mask")


def causal_mask(config: ModelConfig) -> Tensor:
    """(ctx_len, ctx_len): 1 where a token (row) may look at another (column), itself or earlier; else 0."""
    return torch.ones(config.ctx_len, config.ctx_len).tril_()


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
        if is_mask(name):
            weights[name] = causal_mask(config)
        elif name == "emb.weight":
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
    if name == "head_q.weight" or name.endswith(_ZERO):
        return 0.0
    if name == "head.weight":
        return 0.5 * tall
    gain = tall if recipe == "seed" else 1.0
    if name == "head_k.weight" or (recipe == "head" and name.endswith(("att.key.weight", "att.gate.weight"))):
        return 0.1 * gain
    return gain


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
    if part.endswith(".bias") or name == "ln_out.bias" or part.startswith("pos_emb_"):
        return torch.zeros(shape)
    if not part.startswith(("att.", "ffn.", "ffnPre.")):
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
