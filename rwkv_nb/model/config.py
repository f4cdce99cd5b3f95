"""Sizes of an RWKV-5.2 model, and how to read them from a checkpoint.

What it is not: flags of training (`rwkv_nb.training.config`). Field names are those of the official trainer.

Symbols: L n_layer, D n_embd, V vocab_size, A dim_att (D by default), F dim_ffn (3.5 D rounded down to 32), N
head_size_a, H = A / N heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_OPTIONS = {  # key of the field in a checkpoint -> field
    r"ffnPre\.": "pre_ffn",
    r"^head_[qk]\.": "head_qk",
    r"tiny_": "tiny_att_dim",
    r"pos_emb_[xy]": "my_pos_emb",
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model; dim_att = 0 and dim_ffn = 0 are replaced by the official defaults.

    Raises:
        ValueError: a size is not positive or not divisible as the model needs, or an option is not supported.
    """

    n_layer: int
    n_embd: int
    vocab_size: int
    ctx_len: int = 1024  # length of a training sample; the model itself runs on any length
    head_size_a: int = 64
    head_size_divisor: int = 8
    dim_att: int = 0
    dim_ffn: int = 0
    dropout: float = 0.0
    pre_ffn: int = 0
    head_qk: int = 0
    tiny_att_dim: int = 0
    tiny_att_layer: int = -999
    my_pos_emb: int = 0

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "vocab_size", "ctx_len", "head_size_a", "head_size_divisor"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ModelConfig: {name} = {value!r} must be a whole number of at least 1")
        for name in ("dim_att", "dim_ffn"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"ModelConfig: {name} = {value!r} must be a whole number; 0 means the default")
        if self.dim_att == 0:
            object.__setattr__(self, "dim_att", self.n_embd)
        if self.dim_ffn == 0:
            object.__setattr__(self, "dim_ffn", int(self.n_embd * 3.5 // 32 * 32))
        for name in ("n_embd", "dim_att", "dim_ffn"):
            value = getattr(self, name)
            if value < 32 or value % 32:
                raise ValueError(
                    f"ModelConfig: {name} = {value} must be a multiple of 32, such as {value // 32 * 32 + 32}"
                )
        if self.dim_att % self.head_size_a:
            raise ValueError(
                f"ModelConfig: dim_att = {self.dim_att} (n_embd unless given) is not a multiple of "
                f"head_size_a = {self.head_size_a}: it must split into whole heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ModelConfig: dropout = {self.dropout} must be at least 0 and below 1")
        for name in ("pre_ffn", "head_qk", "tiny_att_dim", "my_pos_emb"):
            if getattr(self, name) > 0:
                raise ValueError(f"ModelConfig: {name} = {getattr(self, name)} is not supported; set {name} = 0")

    @property
    def n_head(self) -> int:
        """H: the number of heads."""
        return self.dim_att // self.head_size_a

    @property
    def n_params(self) -> int:
        """The number of trainable numbers."""
        L, D, A, F = self.n_layer, self.n_embd, self.dim_att, self.dim_ffn
        block = 5 * A * D + 2 * D * F + D * D + 10 * D + 4 * A
        return 2 * self.vocab_size * D + 4 * D + L * block

    @classmethod
    def from_state_dict(
        cls, weights: Mapping, *, ctx_len: int = 1024, head_size_divisor: int = 8, dropout: float = 0.0
    ) -> ModelConfig:
        """Read every size from the shapes of an RWKV-5.2 checkpoint. What a file does not tell can be given.

        Raises:
            ValueError: not a checkpoint of RWKV-5.2 (another version is named), or a needed key is missing.
        """
        version = checkpoint_version(weights)
        if version != "5.2":
            raise ValueError(
                f"these are weights of RWKV-{version}; this model is RWKV-5.2 (Eagle, file names with v5 "
                "r2 or 'RWKV-5-World'): choose such a checkpoint"
            )
        for key in weights:
            for pattern, field in _OPTIONS.items():
                if re.search(pattern, key):
                    raise ValueError(f"the checkpoint has {key!r}: it was trained with {field}, which is not supported")
        layers = [int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", key) for key in weights) if m]
        (V, D), (H, N) = _matrix(weights, "emb.weight"), _matrix(weights, "blocks.0.att.time_decay")
        return cls(
            n_layer=max(layers) + 1,
            n_embd=D,
            vocab_size=V,
            ctx_len=ctx_len,
            head_size_a=N,
            head_size_divisor=head_size_divisor,
            dim_att=H * N,
            dim_ffn=_matrix(weights, "blocks.0.ffn.key.weight")[0],
            dropout=dropout,
        )


def _matrix(weights: Mapping, key: str) -> tuple[int, int]:
    if key not in weights:
        raise ValueError(f"the checkpoint has no {key!r}: it is incomplete")
    shape = tuple(weights[key].shape)
    if len(shape) != 2:
        raise ValueError(f"the checkpoint's {key!r} has shape {shape}; two dimensions are expected")
    return shape


def checkpoint_version(weights: Mapping) -> str:
    """The RWKV version ("4", "5.0", "5.1", "5.2", "6", "7") that the keys of a checkpoint belong to.

    The versions differ in what a block's time mixing holds: 4 has no `ln_x`; 5.0 adds it; 5.1 adds `gate`; in 5.2
    the decay is a matrix (a number for each channel, not for each head); 6 mixes with `time_maa`; 7 has `att.x_r`.

    Raises:
        ValueError: no keys of an RWKV model.
    """
    names = {key.split(".att.", 1)[1] for key in weights if ".att." in key}
    if not names or not any(key.startswith("blocks.") for key in weights):
        example = ", ".join(list(weights)[:3]) or "nothing"
        raise ValueError(f"not a checkpoint of an RWKV model: no 'blocks.0.att.…' among its keys (it has {example}, …)")
    if "x_r" in names or "r_k" in names:
        return "7"
    if any(name.startswith("time_maa") for name in names):
        return "6"
    if "ln_x.weight" not in names:
        return "4"
    decay = next((x for key, x in weights.items() if key.endswith(".att.time_decay")), None)
    if decay is not None and decay.dim() == 2 and decay.shape[1] > 1:
        return "5.2"
    return "5.1" if "gate.weight" in names else "5.0"
