"""Strategies on a GPU: bytes that the package really allocates there, and engines that say what the model says.

Skipped without one. What it is not: a measurement of speed.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

from rwkv_nb.inference.engine import PackageEngine, load_engine
from rwkv_nb.inference.memory import memory_plan
from rwkv_nb.inference.strategy import parse_strategy
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: needs one, and a torch that sees it"),
]
os.environ.setdefault("RWKV_JIT_ON", "0")
CONFIG = ModelConfig(8, 128, 200)
SPLIT = ["cuda fp16i8 *3 -> cpu fp32", "cuda fp16 *2+", "cuda fp16i8 *0+ -> cpu fp32 *1", "cuda bf16 *4 -> cuda fp16"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    g = torch.Generator().manual_seed(0)
    weights = {name: (x + 0.1 * torch.randn(x.shape, generator=g)).bfloat16()
               for name, x in init_weights(CONFIG, seed=0).items()}  # fmt: skip
    path = tmp_path_factory.mktemp("gpu") / "model.pth"
    torch.save(weights, path)
    return path


@pytest.mark.parametrize("text", ["cuda fp16", "cuda bf16", "cuda fp32", "cuda fp16i8", "cuda bf16i8", *SPLIT])
def test_bytes_lie_where_they_were_planned(file, text):
    engine = load_engine(file, text, engine="package")
    allocated = Counter()
    for x in engine.package.w.values():
        allocated[x.device.type] += x.nbytes
    needed = memory_plan(parse_strategy(text, CONFIG.n_layer), CONFIG)
    assert needed.weights == dict(allocated)
    _, state = engine(torch.tensor([[1, 2, 3]]))
    held = Counter()
    for x in state:
        held[x.device.type] += x.nbytes
    assert needed.state == dict(held)


@pytest.mark.parametrize(
    ("text", "kind", "tolerance"),
    [("cuda fp32", RWKV, 1e-2), ("cuda bf16", RWKV, 0.1), ("cuda fp16", RWKV, 0.02),
     *((text, PackageEngine, 0.1) for text in ("cuda fp16i8", *SPLIT))],
)  # fmt: skip
def test_every_engine_says_what_the_model_says(file, text, kind, tolerance):
    want, _ = RWKV.from_checkpoint(file).double()(torch.arange(1, 30)[None])
    engine = load_engine(file, text)
    assert type(engine) is kind
    ids = torch.arange(1, 30, device=engine.emb.weight.device)[None]
    whole, _ = engine(ids)
    state, pieces = None, []
    for part in ids.split([7, 1, 21], dim=1):
        logits, state = engine(part, state)
        pieces.append(logits)
    for got in (whole, torch.cat(pieces, 1)):
        assert float((got.cpu().double() - want).abs().max()) < tolerance * float(want.abs().max())
