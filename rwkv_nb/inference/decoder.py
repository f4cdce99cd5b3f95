"""A model for writing on a processor: each token in one call of C++, weights stored in 32, 16 or 8 bits.

    decoder = Decoder(RWKV.from_checkpoint(path), "int8")
    logits, state = decoder(idx, state)            like the RWKV it was made from, for generate() and everything else

Writing reads every weight once a token, so memory is what limits it; products of one row with a matrix in PyTorch reach
about a third of that limit. Prompts (T > 1) go through the RWKV itself, time-parallel, with the same stored weights.

What it is not: for training, for a GPU, or for the rare options of the model (`rwkv_nb.model.options`). The mathematics
is in the header of `kernels/decode_cpu.cpp`, products are in `packed_cpu.h`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.wkv import build
from rwkv_nb.wkv.cpu import openmp

from .buffers import Pages, Recycled
from .packing import Packed, pack
from .prompt import PromptReader

SOURCE = "decode_cpu.cpp"
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
VECTORS = 16  # a kernel row must fill whole registers
_NORMS, _MIXES = ("ln1", "ln2", "att.ln_x"), ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "att.time_mix_g")
_FFN_MIXES = ("ffn.time_mix_k", "ffn.time_mix_r")
_MATRICES = (
    *(f"att.{name}" for name in ("receptance", "key", "value", "gate", "output")),
    *(f"ffn.{name}" for name in ("key", "receptance", "value")),
)


def _fields(*pointers: str) -> list:
    return [(name, ctypes.c_void_p) for name in pointers]


class _Matrix(ctypes.Structure):
    _fields_ = [*_fields("numbers", "scales"), *((name, ctypes.c_int64) for name in ("rows", "columns"))]


class _Norm(ctypes.Structure):
    _fields_ = _fields("weight", "bias")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name.removeprefix("att."), _Norm) for name in _NORMS),
        *_fields("mix_k", "mix_v", "mix_r", "mix_g", "decay", "bonus", "ffn_mix_k", "ffn_mix_r"),
        *((name.replace(".", "_"), _Matrix) for name in _MATRICES),
    ]


class _Step(ctypes.Structure):
    """`struct Step` of the source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "n_layer", "D", "A", "F", "V", "N", "storage", "threads")),
        ("eps_x", ctypes.c_double),
        *_fields("parallel", "team", "ids", "emb"),
        ("emb_storage", ctypes.c_int64),
        ("ln0", _Norm),
        ("ln_out", _Norm),
        *_fields("layers", "states"),
        ("head", _Matrix),
        *_fields("logits"),
    ]


class _Product(ctypes.Structure):
    """`struct Product`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "storage", "pairs", "narrow", "threads")),
        *_fields("parallel", "team"),
        ("matrix", _Matrix),
        *_fields("x", "y"),
    ]


def why_not() -> str | None:
    """None if a decoder can run here, else what is missing and the remedy. Compiles nothing."""
    return None if build.find_cxx() else f"no C++ compiler was found: {build.CXX_REMEDY}"


@functools.cache
def _library() -> ctypes.CDLL:
    flags = build.cxx_flags(fast_math=False)  # sums are written in the order in which they are quick
    if "-march=x86-64-v4" in flags and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        flags.append("-mavx512bf16")  # products of bfloat16 numbers; no level of the instruction set includes it
    return build.load("decode_cpu", [SOURCE], flags)


def product(packed: Packed, x: Tensor, y: Tensor) -> None:
    """x (n, packed.width) times the matrix, turned, into y (n, rows), each float32 or bfloat16. Raises MemoryError.

    If x is bfloat16, the matrix is rounded to it too; sums are float32 either way.
    """
    parallel, team = openmp()
    call = _Product(
        n=len(x), storage=FORMATS[packed.numbers.dtype], pairs=x.dtype == torch.bfloat16,
        narrow=y.dtype == torch.bfloat16, threads=torch.get_num_threads(), parallel=parallel, team=team,
        matrix=_matrix(packed), x=x.data_ptr(), y=y.data_ptr(),
    )  # fmt: skip
    if _library().rwkv5_product(ctypes.byref(call)):
        raise MemoryError(f"Decoder: not enough memory for the scratch of {call.threads} threads; use fewer threads")


class Decoder:
    """RWKV for writing: called like the model, (B, T) ids and a state -> logits and the new state.

    Args:
        model: an RWKV on the CPU without rare options. Its weights are copied.
        storage: "float32", "bfloat16" (exact for official files, which hold bfloat16) or "int8".
        products: what the matrices of a prompt are multiplied in, "float32" or "bfloat16", which is faster on
            processors that have instructions for it. A single step always computes in float32.

    Raises:
        ValueError: the model has a rare option, is not on the CPU, or has sizes that the kernel cannot do.
        build.BuildError: no C++ compiler, or it failed.
    """

    def __init__(self, model: RWKV, storage: str = "bfloat16", products: str = "float32"):
        c = model.config
        for name in ("pre_ffn", "head_qk", "tiny_att_dim", "my_pos_emb", "my_testing"):
            if getattr(c, name):
                raise ValueError(f"Decoder: the model has {name} = {getattr(c, name)!r}; call the RWKV itself")
        if model.emb.weight.device.type != "cpu":
            raise ValueError(f"Decoder: the model is on {model.emb.weight.device}; it must be on the CPU")
        for name in ("n_embd", "dim_att", "dim_ffn", "head_size_a"):
            if getattr(c, name) % VECTORS:
                raise ValueError(
                    f"Decoder: {name} = {getattr(c, name)} is no multiple of {VECTORS}; call the RWKV itself"
                )
        if reason := why_not():
            raise build.BuildError(f"Decoder: {reason}")
        self.config, self.storage, self.training = c, storage, False
        weights = model.state_dict()
        self._kept: list[Tensor] = []  # what C++ points to
        self._states_memory, self._logits_memory = Recycled(), Recycled()
        pages = Pages()
        names = _matrix_names(c.n_layer)
        self.matrices = {name: pack(weights[f"{name}.weight"], storage, pages.empty) for name in names}
        short = torch.float32 if storage == "float32" else torch.bfloat16
        self._emb = weights["emb.weight"].detach().to(short).contiguous()
        self._step = self._describe(weights)
        rest = {name: x.float() for name, x in weights.items() if name.removesuffix(".weight") not in self.matrices}
        self._prompt = PromptReader(c, {**rest, "emb.weight": self._emb}, self.matrices, products, product)
        self.emb = self._prompt.model.emb  # where callers look for the device

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(m.nbytes for m in self.matrices.values()) + self._emb.nbytes + sum(x.nbytes for x in self._kept)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding, of which a step reads one row."""
        return self._emb.nbytes

    def _describe(self, weights: dict[str, Tensor]) -> _Step:
        """Everything of `struct Step` that stays the same from step to step."""
        c = self.config

        def vector(x: Tensor) -> int:
            self._kept.append(x.detach().float().contiguous())
            return self._kept[-1].data_ptr()

        def norm(name: str) -> _Norm:
            return _Norm(vector(weights[f"{name}.weight"]), vector(weights[f"{name}.bias"]))

        layers = (_Layer * c.n_layer)()
        for i, layer in enumerate(layers):
            of = f"blocks.{i}."
            decay = torch.exp(-torch.exp(weights[f"{of}att.time_decay"].double()))
            values = [*(norm(of + name) for name in _NORMS), *(vector(weights[of + name]) for name in _MIXES)]
            values += [vector(decay), vector(weights[f"{of}att.time_faaaa"])]
            values += [vector(weights[of + name]) for name in _FFN_MIXES]
            values += [_matrix(self.matrices[of + name]) for name in _MATRICES]
            for (field, _), value in zip(_Layer._fields_, values, strict=True):
                setattr(layer, field, value)
        self._layers = layers
        self._states = np.zeros((c.n_layer, 6), np.int64)  # of `struct State`: pointers to read, to write
        head = self.matrices["head"]
        parallel, team = openmp()
        return _Step(
            n_layer=c.n_layer, D=c.n_embd, A=c.dim_att, F=c.dim_ffn, V=c.vocab_size, N=c.head_size_a,
            storage=FORMATS[head.numbers.dtype], eps_x=1e-5 * c.head_size_divisor**2,
            parallel=parallel, team=team, emb=self._emb.data_ptr(), emb_storage=FORMATS[self._emb.dtype],
            ln0=norm("blocks.0.ln0"), ln_out=norm("ln_out"),
            layers=ctypes.addressof(layers), states=self._states.ctypes.data, head=_matrix(head),
        )  # fmt: skip

    def __call__(
        self, idx: Tensor, state: list[Tensor] | None = None, *, full_output: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """As `RWKV.forward`: idx (B, T) -> logits (B, T, V), or (B, 1, V) without full_output, and the state."""
        if idx.dim() != 2 or idx.shape[1] != 1:
            return self._prompt(idx, state, full_output=full_output)
        logits, state = self.step(idx[:, 0], self.new_state(idx.shape[0]) if state is None else state)
        return logits.unsqueeze(1), state

    def new_state(self, batch_size: int = 1) -> list[Tensor]:
        """The state before the first token; see `RWKV.new_state`."""
        return [x.float() for x in self._prompt.model.new_state(batch_size)]

    def _shapes(self, B: int) -> list[torch.Size]:
        """Of a layer's state."""
        c = self.config
        x = torch.Size((B, c.n_embd))
        return [x, torch.Size((B, c.n_head, c.head_size_a, c.head_size_a)), x]

    def step(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One token for each of B rows: ids (B,) int64, state as of RWKV -> logits (B, V) float32, the new state.

        Raises ValueError: an id outside the vocabulary, or a state of other shapes.
        """
        c, call = self.config, self._step
        B = ids.shape[0]
        if B and not 0 <= int(ids.min()) <= int(ids.max()) < c.vocab_size:
            raise ValueError(
                f"Decoder: token ids run from {int(ids.min())} to {int(ids.max())}, but this model has vocab_size = "
                f"{c.vocab_size}: was the text encoded with another tokenizer?"
            )
        ids = ids.to(torch.int64).contiguous()
        state = [x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous() for x in state]
        shapes = self._shapes(B)
        if [x.shape for x in state] != shapes * c.n_layer:
            raise ValueError(
                f"Decoder: the state must be {3 * c.n_layer} tensors, the first three of shapes {shapes}, got "
                f"{len(state)}, the first three of shapes {[tuple(x.shape) for x in state[:3]]}"
            )
        sizes = [c.n_layer * shape.numel() for shape in shapes]
        memory = self._states_memory.empty(sum(sizes)).split(sizes)
        kinds = [x.view(c.n_layer, *shape) for x, shape in zip(memory, shapes, strict=True)]
        after = [x for layer in zip(*(kind.unbind() for kind in kinds), strict=True) for x in layer]
        for columns, tensors in ((slice(3), state), (slice(3, 6), after)):
            self._states[:, columns] = np.array([x.data_ptr() for x in tensors]).reshape(-1, 3)
        logits = self._logits_memory.empty(B * c.vocab_size).view(B, c.vocab_size)
        call.B, call.threads, call.ids, call.logits = B, torch.get_num_threads(), ids.data_ptr(), logits.data_ptr()
        if B and _library().rwkv5_step(ctypes.byref(call)):
            raise MemoryError(f"Decoder: not enough memory for a step of {B} rows")
        return logits, after


def _matrix_names(n_layer: int) -> Iterable[str]:
    return [*(f"blocks.{i}.{name}" for i in range(n_layer) for name in _MATRICES), "head"]


def _matrix(packed: Packed) -> _Matrix:
    scales = None if packed.scales is None else packed.scales.data_ptr()
    return _Matrix(packed.numbers.data_ptr(), scales, packed.rows, packed.width)
