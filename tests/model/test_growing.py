"""Growing: the official loop written out again, and what a grown model computes."""

import math

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.growing import grow, interpolated
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV


def trained(config, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: x + 0.2 * torch.randn(x.shape, generator=g) for name, x in init_weights(config, seed=seed).items()}


def stretched(old, n):
    """The official rule as a loop, in float64."""
    old = old.double()
    rows = []
    for i in range(n):
        place = i / n * len(old)
        if place >= len(old) - 1:
            rows.append(old[-1])
        else:
            low = math.floor(place)
            rows.append(old[low] * (1 - (place - low)) + old[low + 1] * (place - low))
    return torch.stack(rows)


@pytest.mark.parametrize(("m", "n"), [(5, 13), (4, 8), (13, 5), (1, 6), (7, 7), (3, 100)])
def test_interpolation_is_the_official_loop(m, n):
    old = torch.randn(m, 4, generator=torch.Generator().manual_seed(m * n))
    torch.testing.assert_close(interpolated(old, n).double(), stretched(old, n), rtol=1e-6, atol=1e-6)


def test_deeper_computes_the_same_until_it_trains():
    small, large = ModelConfig(2, 64, 50), ModelConfig(5, 64, 50)
    old = trained(small)
    grown = grow(init_weights(large, seed=1), old)
    idx = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(RWKV(large, grown)(idx)[0], RWKV(small, old)(idx)[0], rtol=1e-5, atol=1e-5)
    fresh = init_weights(large, seed=1)
    assert torch.equal(grown["blocks.1.att.time_mix_k"], old["blocks.1.att.time_mix_k"])
    assert torch.equal(grown["blocks.4.att.key.weight"], fresh["blocks.4.att.key.weight"])
    assert list(grown) == list(fresh)


def test_a_larger_vocabulary_is_stretched():
    old = trained(ModelConfig(2, 64, 50))
    grown = grow(init_weights(ModelConfig(2, 64, 80), seed=1), old)
    for name in ("emb.weight", "head.weight"):
        torch.testing.assert_close(grown[name].double(), stretched(old[name], 80), rtol=1e-6, atol=1e-6)
    assert torch.equal(grown["blocks.1.ffn.value.weight"], old["blocks.1.ffn.value.weight"])


def test_vectors_positions_and_the_decay_of_rwkv_5_1():
    new = {
        "blocks.0.ln1.weight": torch.zeros(9),
        "blocks.0.att.time_mix_k": torch.zeros(1, 1, 9),
        "blocks.0.pos_emb_x": torch.zeros(1, 5, 3),
        "blocks.0.att.time_decay": torch.zeros(4, 8),
        "blocks.0.att.time_faaaa": torch.zeros(4, 8),
    }
    g = torch.Generator().manual_seed(0)
    old = {
        "blocks.0.ln1.weight": torch.randn(6, generator=g),
        "blocks.0.att.time_mix_k": torch.randn(1, 1, 6, generator=g),
        "blocks.0.pos_emb_x": torch.randn(1, 3, 3, generator=g),
        "blocks.0.att.time_decay": torch.randn(2, generator=g),  # a number a head, not a channel
        "blocks.0.att.time_faaaa": torch.randn(2, 16, generator=g),  # the same width cut into other heads
    }
    grown = grow(new, old)
    want = {
        "blocks.0.ln1.weight": stretched(old["blocks.0.ln1.weight"], 9),
        "blocks.0.att.time_mix_k": stretched(old["blocks.0.att.time_mix_k"].flatten(), 9).view(1, 1, 9),
        "blocks.0.pos_emb_x": stretched(old["blocks.0.pos_emb_x"][0], 5)[None],
        "blocks.0.att.time_decay": stretched(old["blocks.0.att.time_decay"], 4)[:, None].expand(4, 8),
        "blocks.0.att.time_faaaa": old["blocks.0.att.time_faaaa"].double().view(4, 8),
    }
    for name, x in want.items():
        torch.testing.assert_close(grown[name].double(), x, rtol=1e-6, atol=1e-6)
    assert not any(x.any() for x in new.values())


def test_new_options_keep_their_fresh_values_and_masks_follow_ctx_len():
    small = ModelConfig(2, 64, 50, ctx_len=8, head_qk=8)
    large = ModelConfig(2, 64, 50, ctx_len=24, head_qk=8, my_pos_emb=5)
    old = {name: x.bfloat16() for name, x in trained(small).items()}
    grown = grow(init_weights(large, seed=1), old)
    assert grown["copy_mask"].shape == (24, 24) and not grown["blocks.0.pos_emb_x"].any()
    assert all(x.dtype == torch.float32 for x in grown.values())
    assert torch.equal(grown["head_q.weight"], old["head_q.weight"].float())


def test_what_cannot_grow_is_named():
    fresh = init_weights(ModelConfig(1, 64, 50), seed=0)
    with pytest.raises(ValueError, match=r"new one lacks: blocks.1.ln1.weight.* and 18 more; .*n_layer"):
        grow(fresh, init_weights(ModelConfig(2, 64, 50), seed=0))
    with pytest.raises(ValueError, match=r"emb.weight: .*\(50, 32\), the new one \(50, 64\).*n_embd"):
        grow(fresh, init_weights(ModelConfig(1, 32, 50, head_size_a=16), seed=0))
    with pytest.raises(ValueError, match="emb.weight"):  # as many entries, but other rows and columns
        grow(fresh, {"emb.weight": torch.zeros(100, 32)})
