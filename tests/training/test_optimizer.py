"""Parameter groups: the official sets by recipe and stage, nothing lost or doubled; the Adam that follows from them."""

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.optimizer import build_optimizer, param_groups, set_rates

MIXES = {f"att.time_mix_{x}" for x in "kvrg"} | {"ffn.time_mix_k", "ffn.time_mix_r"}
MATRICES = {f"att.{x}.weight" for x in ("receptance", "key", "value", "gate", "output")}
MATRICES |= {f"ffn.{x}.weight" for x in ("receptance", "key", "value")}


@pytest.fixture(scope="module")
def model():
    return RWKV(ModelConfig(n_layer=2, n_embd=128, vocab_size=50))


def names(model, groups):
    """group -> set of names without "blocks.i."; also that each parameter is there once, in the order of names."""
    name_of = {id(p): n for n, p in model.named_parameters()}
    all_ids = [id(p) for g in groups for p in g["params"]]
    assert len(all_ids) == len(set(all_ids)) and set(all_ids) == set(name_of)
    for g in groups:
        order = [name_of[id(p)] for p in g["params"]]
        assert order == sorted(order)
    return {g["name"]: {name_of[id(p)].split(".", 2)[-1] if "blocks" in name_of[id(p)] else name_of[id(p)]
                        for p in g["params"]} for g in groups}  # fmt: skip


@pytest.mark.parametrize("recipe", ["head", "seed"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_layerwise_groups(model, recipe, stage):
    cfg = TrainConfig(recipe=recipe, my_pile_stage=stage, magic_prime=389, weight_decay=0.01)
    groups = param_groups(model, cfg)
    assert [g["name"] for g in groups] == ["1x", "2x", "3x", "decay"]
    assert [g["my_lr_scale"] for g in groups] == ([1, 5, 5, 1] if stage == 2 else [1, 2, 3, 1])
    assert [g["weight_decay"] for g in groups] == [0, 0, 0, 0.01]
    got = names(model, groups)
    assert got["decay"] == MATRICES | {"emb.weight", "head.weight"}
    if stage == 2:
        assert got["2x"] == MIXES | {"att.time_faaaa"} and got["3x"] == {"att.time_decay"}
    else:
        assert got["2x"] == {"att.time_decay"} and got["3x"] == set()
        assert got["1x"] >= MIXES | {"att.time_faaaa", "ln1.weight", "att.ln_x.bias", "ln_out.weight"}


def test_without_decay_matrices_join_the_first_group(model):
    groups = param_groups(model, TrainConfig(weight_decay=0.0))
    assert [g["name"] for g in groups] == ["1x", "2x", "3x"]
    assert names(model, groups)["1x"] >= MATRICES | {"emb.weight"}


def test_without_layerwise_rates_the_recipes_differ(model):
    flags = {"layerwise_lr": 0, "weight_decay": 0.01, "my_pile_stage": 2, "magic_prime": 389}
    head = param_groups(model, TrainConfig(**flags, recipe="head"))
    seed = param_groups(model, TrainConfig(**flags, recipe="seed"))
    assert [(g["name"], g["my_lr_scale"]) for g in head] == [("1x", 1), ("decay", 1)]
    assert names(model, seed)["decay"] - names(model, head)["decay"] == {"att.time_decay", "att.time_faaaa"}
    assert names(model, head)["1x"] >= MIXES, "time_mix is 1 x 1 x D: a vector, never decayed"


def test_adam_or_adamw(model):
    cfg = TrainConfig(beta1=0.8, beta2=0.95, adam_eps=1e-6, lr_init=1e-3, precision="bf16")
    plain, decayed = build_optimizer(model, cfg), build_optimizer(model, cfg.replace(weight_decay=0.1))
    assert type(plain) is torch.optim.Adam and type(decayed) is torch.optim.AdamW
    for g in plain.param_groups + decayed.param_groups:
        assert (g["betas"], g["eps"], g["lr"]) == ((0.8, 0.95), 1e-6, 1e-3)
    assert [g["weight_decay"] for g in decayed.param_groups] == [0, 0, 0, 0.1]
    scaled = build_optimizer(model, cfg.replace(precision="fp16"))
    assert plain.defaults["fused"] and not scaled.defaults["fused"]


def test_rates_reach_the_groups(model):
    cfg = TrainConfig(weight_decay=0.1)
    optimizer = build_optimizer(model, cfg)
    set_rates(optimizer, cfg, 0.5, 0.03)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1.0, 1.5, 0.5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0, 0, 0, 0.03]
    set_rates(optimizer, cfg, 0.5, 0.0)
    set_rates(optimizer, cfg, 0.5, 0.02)
    assert optimizer.param_groups[3]["weight_decay"] == 0.02, "a decay that passed through 0 comes back"
    flat = cfg.replace(layerwise_lr=0)
    optimizer = build_optimizer(model, flat)
    set_rates(optimizer, flat, 0.25, 0.1)
    assert {g["lr"] for g in optimizer.param_groups} == {0.25}


def test_a_step_is_adam_by_hand():
    w = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64))
    model = torch.nn.ParameterDict()
    model["weight"] = torch.nn.Parameter(w.detach().clone())
    holder = torch.nn.Module()
    holder.layer = torch.nn.Module()
    holder.layer.weight = model["weight"]
    cfg = TrainConfig(weight_decay=0.1, lr_init=0.01, beta1=0.9, beta2=0.99, adam_eps=1e-8, precision="fp32")
    optimizer = build_optimizer(holder, cfg)
    expected, m, v = w.detach().clone(), 0.0, 0.0
    for t in range(1, 4):
        gradient = torch.tensor([[0.1, -0.2], [0.3, t / 10]], dtype=torch.float64)
        holder.layer.weight.grad = gradient.clone()
        set_rates(optimizer, cfg, 0.01, 0.1)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        expected = expected * (1 - 0.01 * 0.1)
        expected = expected - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(holder.layer.weight.detach(), expected, rtol=1e-12, atol=0)
