"""Sizes of an RWKV-5.2 model, and how to read them from a checkpoint.

What it is not: flags of training (`rwkv_nb.training.config`). Field names are those of the official trainer.

Symbols: L n_layer, D n_embd, V vocab_size, A dim_att (D by default), F dim_ffn (3.5 D rounded down to 32), N
head_size_a, H = A / N heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

VARIANTS = {"": "", "x052": "", "g": "g", "x052g": "g"}  # my_testing -> what it changes: "g" is MishGLU
WORLD_SIZES = {  # name -> (n_layer, n_embd) of the official World models; their vocabulary has 65536 entries
    "0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096),
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a model; dim_att = 0 and dim_ffn = 0 are replaced by the official defaults.

    Raises:
        ValueError: a size is not positive or not divisible as the model needs, or an option does not fit the sizes.
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
    pre_ffn: int = 0  # this and what follows: see options.py; 0 is without
    head_qk: int = 0
    tiny_att_dim: int = 0
    tiny_att_layer: int = -999
    my_pos_emb: int = 0
    my_testing: str = ""  # one of VARIANTS; kept as "" or "g"

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
        self._check_options()

    def _check_options(self) -> None:
        for name in ("pre_ffn", "head_qk", "tiny_att_dim", "my_pos_emb"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"ModelConfig: {name} = {value!r} must be a whole number; 0 means without it")
        if self.my_testing not in VARIANTS:
            raise ValueError(
                f"ModelConfig: my_testing = {self.my_testing!r} is none of {', '.join(map(repr, VARIANTS))}: only "
                "RWKV-5.2 is built here, and with 'g' its MishGLU variant"
            )
        object.__setattr__(self, "my_testing", VARIANTS[self.my_testing])
        object.__setattr__(self, "pre_ffn", min(1, self.pre_ffn))
        if self.pre_ffn and self.n_layer == 1:
            raise ValueError(
                "ModelConfig: pre_ffn = 1 takes the time mixing out of block 0, and with n_layer = 1 there is no other "
                "block that could remember: set pre_ffn = 0, or n_layer = 2 or more"
            )
        if self.tiny_att_dim and not 0 <= self.tiny_att_layer < self.n_layer:
            raise ValueError(
                f"ModelConfig: tiny_att_dim = {self.tiny_att_dim} with tiny_att_layer = {self.tiny_att_layer}: name "
                f"the block that has the tiny attention, 0 to {self.n_layer - 1}"
            )
        if not self.tiny_att_dim:
            object.__setattr__(self, "tiny_att_layer", -999)
        if self.my_pos_emb and self.my_pos_emb**2 != self.ctx_len + 1:
            n = self.my_pos_emb
            raise ValueError(
                f"ModelConfig: my_pos_emb = {n} needs ctx_len = {n * n - 1} ({n} x {n} positions, the last without "
                f"an input), not {self.ctx_len}: change one of them, or set my_pos_emb = 0"
            )

    @property
    def n_head(self) -> int:
        """H: the number of heads."""
        return self.dim_att // self.head_size_a

    @property
    def n_params(self) -> int:
        """The number of trainable numbers."""
        L, D, A, F = self.n_layer, self.n_embd, self.dim_att, self.dim_ffn
        norms, time_mix, channel_mix = 4 * D, 5 * A * D + 4 * D + 4 * A, 2 * D * F + D * D + 2 * D
        ffn = 3 * D * F + 2 * D if self.my_testing == "g" else channel_mix
        n = 2 * self.vocab_size * D + 4 * D + L * (norms + time_mix + ffn)
        if self.pre_ffn:
            n += channel_mix - time_mix
        if self.tiny_att_dim:
            n += 2 * D + 2 * self.tiny_att_dim * D + D * D
        return n + 2 * self.my_pos_emb * D + 2 * self.head_qk * D

    @classmethod
    def from_state_dict(
        cls, weights: Mapping, *, ctx_len: int | None = None, head_size_divisor: int = 8, dropout: float = 0.0
    ) -> ModelConfig:
        """Read every size and option from the shapes of an RWKV-5.2 checkpoint. What a file does not tell can be given.

        ctx_len is told by a position embedding or by the mask of head_qk or tiny attention; else it is 1024.

        Raises:
            ValueError: not a checkpoint of RWKV-5.2 (another version is named), or a needed key is missing.
        """
        version = checkpoint_version(weights)
        if version != "5.2":
            raise ValueError(
                f"these are weights of RWKV-{version}; this model is RWKV-5.2 (Eagle, file names with v5 "
                "r2 or 'RWKV-5-World'): choose such a checkpoint"
            )
        layers = [int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", key) for key in weights) if m]
        V, D = _matrix(weights, "emb.weight")
        pre_ffn = any(key.startswith("blocks.0.ffnPre.") for key in weights)
        H, N = _matrix(weights, f"blocks.{1 if pre_ffn else 0}.att.time_decay")
        my_testing = "g" if "blocks.0.ffn.aa.weight" in weights else ""
        tiny = [int(key.split(".")[1]) for key in weights if key.endswith(".tiny_q.weight")]
        across = weights.get("blocks.0.pos_emb_x")
        n = across.shape[1] if across is not None and across.dim() == 3 else 0
        if ctx_len is None:
            masks = [len(x) for key, x in weights.items() if key.endswith(("copy_mask", ".tiny_mask")) and x.dim()]
            ctx_len = n * n - 1 if n else masks[0] if masks else 1024
        return cls(
            n_layer=max(layers) + 1,
            n_embd=D,
            vocab_size=V,
            ctx_len=ctx_len,
            head_size_a=N,
            head_size_divisor=head_size_divisor,
            dim_att=H * N,
            dim_ffn=_matrix(weights, "blocks.0.ffn.aa.weight" if my_testing else "blocks.0.ffn.key.weight")[0],
            dropout=dropout,
            pre_ffn=int(pre_ffn),
            head_qk=_matrix(weights, "head_q.weight")[0] if "head_q.weight" in weights else 0,
            tiny_att_dim=_matrix(weights, f"blocks.{tiny[0]}.tiny_q.weight")[0] if tiny else 0,
            tiny_att_layer=tiny[0] if tiny else -999,
            my_pos_emb=n,
            my_testing=my_testing,
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
