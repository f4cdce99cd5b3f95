"""Initial weights of both recipes: golden values of the official code, and what orthogonal means."""

import math

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights, parameter_shapes
from rwkv_nb.model.rwkv import RWKV

CONFIG = ModelConfig(3, 128, 700)


@pytest.fixture(scope="module", params=["head", "seed"])
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def weights(recipe):
    return init_weights(CONFIG, seed=1, recipe=recipe)


def test_official_names_order_and_shapes(weights):
    names = list(weights)
    assert names[:7] == [
        "emb.weight",
        *(f"blocks.0.{n}.{p}" for n in ("ln1", "ln2", "ln0") for p in ("weight", "bias")),
    ]
    assert names[7:24] == [
        f"blocks.0.{name}"
        for name in (
            *(f"att.time_mix_{m}" for m in "kvrg"),
            *("att.time_decay", "att.time_faaaa"),
            *(f"att.{m}.weight" for m in ("receptance", "key", "value", "output", "gate")),
            *("att.ln_x.weight", "att.ln_x.bias", "ffn.time_mix_k", "ffn.time_mix_r"),
            *("ffn.key.weight", "ffn.receptance.weight"),
        )
    ]
    assert names[24:26] == ["blocks.0.ffn.value.weight", "blocks.1.ln1.weight"]
    assert names[-3:] == ["ln_out.weight", "ln_out.bias", "head.weight"]
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    assert shapes == parameter_shapes(CONFIG)
    assert shapes["blocks.1.att.time_mix_k"] == (1, 1, 128) and shapes["blocks.1.att.time_decay"] == (2, 64)
    assert shapes["blocks.1.ffn.value.weight"] == (128, 448)
    assert names == list(RWKV(CONFIG, weights).state_dict())
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in weights.values())


def test_golden_decay_and_bonus_of_the_official_code():
    config = ModelConfig(12, 768, 8)
    weights = init_weights(config, seed=0)
    decay = [weights[f"blocks.{i}.att.time_decay"].flatten() for i in (0, 11)]
    assert [float(decay[0][n]) for n in (0, 1, 383, 767)] == pytest.approx([-6, -5.952180, -2.924949, -1], abs=1e-6)
    assert float(decay[1][383]) == pytest.approx(-4.753257, abs=1e-6)
    bonus = [weights[f"blocks.{i}.att.time_faaaa"].flatten() for i in (0, 11)]
    assert bonus[0][:6].tolist() == pytest.approx([0, 0.1, -0.1, 0, 0.1, -0.1])
    assert bonus[1][[0, 1, 767]].tolist() == pytest.approx([1, 0.1 + 766 / 767, -0.1])
    assert float(weights["blocks.3.att.ln_x.weight"][5]) == pytest.approx((4 / 12) ** 0.7)


def test_mixes(weights):
    c = torch.arange(128) / 128
    for i, (rho, kappa) in enumerate([(0, 1), (0.5, 2 / 3), (1, 1 / 3)]):
        got = {
            name: weights[f"blocks.{i}.{name}"].flatten()
            for name in (
                "att.time_mix_k",
                "att.time_mix_v",
                "att.time_mix_r",
                "att.time_mix_g",
                "ffn.time_mix_k",
                "ffn.time_mix_r",
            )
        }
        for name in ("att.time_mix_k", "ffn.time_mix_k", "ffn.time_mix_r"):
            torch.testing.assert_close(got[name], c**kappa)
        torch.testing.assert_close(got["att.time_mix_v"], c**kappa + 0.3 * rho)
        torch.testing.assert_close(got["att.time_mix_r"], c ** (kappa / 2))
        torch.testing.assert_close(got["att.time_mix_g"], c ** (kappa / 2))


def gain(x):
    """The factor before an orthogonal matrix; fails if x is none."""
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    square = float(gram.diagonal().mean())
    torch.testing.assert_close(gram / square, torch.eye(len(gram)), rtol=0, atol=2e-5)
    return math.sqrt(square)


def test_gains(weights, recipe):
    block = {
        name: gain(weights[f"blocks.1.{name}.weight"])
        for name in ("att.receptance", "att.key", "att.value", "att.gate", "ffn.key")
    }
    tall = 1.0 if recipe == "head" else math.sqrt(448 / 128)
    small = 0.1 if recipe == "head" else 1.0
    want = {"att.receptance": 1, "att.key": small, "att.value": 1, "att.gate": small, "ffn.key": tall}
    assert block == pytest.approx(want, rel=1e-4)
    assert gain(weights["head.weight"]) == pytest.approx(0.5 * math.sqrt(700 / 128), rel=1e-4)
    for name in ("att.output", "ffn.value", "ffn.receptance"):
        assert not weights[f"blocks.1.{name}.weight"].any()


def test_small_vocabulary_has_no_gain_for_the_head(recipe):
    weights = init_weights(ModelConfig(1, 128, 96), seed=0, recipe=recipe)
    assert gain(weights["head.weight"]) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("recipe", "limit"), [("head", 1e-4), ("seed", 3e-5)])
def test_embedding_range(recipe, limit):
    emb = init_weights(CONFIG, seed=0, recipe=recipe, lr_init=3e-5)["emb.weight"]
    assert float(emb.abs().max()) <= limit
    assert float(emb.std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)


def test_orthogonal_matrices_have_no_preferred_sign():
    """The mean of many entries of one corner: a decomposition without sign correction has a fixed sign there."""
    config = ModelConfig(1, 32, 1024, head_size_a=16)
    for name in ("head.weight", "blocks.0.att.value.weight"):  # by Cholesky, by QR
        corners = torch.stack([init_weights(config, seed=s)[name][0, 0] for s in range(60)]).sign()
        assert abs(float(corners.mean())) < 0.5


def test_seed():
    a, b, c = (init_weights(CONFIG, seed=s) for s in (5, 5, 6))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    init_weights(CONFIG, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    init_weights(CONFIG)
    assert not torch.equal(before, torch.get_rng_state())


def test_one_layer():
    weights = init_weights(ModelConfig(1, 64, 50), seed=0)
    decay = weights["blocks.0.att.time_decay"].flatten()
    assert decay[0] == -6 and decay[-1] == -1
    assert weights["blocks.0.att.time_faaaa"].flatten()[:3].tolist() == pytest.approx([0, 0.1, -0.1])
    assert (weights["blocks.0.att.ln_x.weight"] == 1).all()
    logits, _ = RWKV(ModelConfig(1, 64, 50), weights)(torch.zeros(1, 4, dtype=torch.long))
    assert logits.isfinite().all()


def test_first_loss_is_that_of_guessing():
    """Blocks start as the identity and the embedding small: logits are small, every token nearly as likely."""
    logits, _ = RWKV(CONFIG, init_weights(CONFIG, seed=0))(torch.arange(40)[None])
    loss = torch.nn.functional.cross_entropy(logits[0], torch.arange(1, 41))
    assert float(loss.detach()) == pytest.approx(math.log(700), abs=0.3)


def test_unknown_recipe():
    with pytest.raises(ValueError, match="recipe = 'tail'.*head, seed"):
        init_weights(CONFIG, recipe="tail")
