"""The rare options: official names and first values, each formula a second way, step by step as all at once."""

import math

import numpy as np
import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights, parameter_shapes
from rwkv_nb.model.options import MishGLU, copy_logits, join_states
from rwkv_nb.model.rwkv import RWKV, check_weights

SIZES = {"n_layer": 2, "n_embd": 32, "vocab_size": 20, "ctx_len": 15, "head_size_a": 16, "dim_ffn": 64}
OPTIONS = {
    "pre_ffn": {"pre_ffn": 1},
    "head_qk": {"head_qk": 6},
    "tiny_att": {"tiny_att_dim": 5, "tiny_att_layer": 1},
    "tiny_att_first": {"tiny_att_dim": 5, "tiny_att_layer": 0},
    "my_pos_emb": {"my_pos_emb": 4},
    "mish_glu": {"my_testing": "g"},
}
ALL = {"pre_ffn": 1, "head_qk": 6, "tiny_att_dim": 5, "tiny_att_layer": 1, "my_pos_emb": 4, "my_testing": "x052g"}
EVERY = OPTIONS | {"all": ALL}
every_option = pytest.mark.parametrize("option", EVERY)


def config(option, **changes):
    return ModelConfig(**(SIZES | EVERY[option] | changes))


def trained_like(config, dtype=torch.float64):
    """Weights as after training: nothing is zero, nothing symmetric."""
    g = torch.Generator().manual_seed(0)
    weights = init_weights(config, seed=0)
    for name, x in weights.items():
        if "mask" not in name:
            x += (0.5 if name == "emb.weight" or "pos_emb" in name else 0.2) * torch.randn(x.shape, generator=g)
    return {name: x.to(dtype) for name, x in weights.items()}


def model_of(option, dtype=torch.float64, **changes):
    return RWKV(config(option, **changes), trained_like(config(option, **changes), dtype))


def tokens(B, T, seed=1):
    return torch.randint(0, 20, (B, T), generator=torch.Generator().manual_seed(seed))


def watch(model, *names):
    """Name -> (arguments, result) of these parts, filled in by the next call of the model."""
    seen = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(name, (x, y)))
    return seen


def numpy(x):
    return x.detach().numpy()


def test_official_names_and_shapes_in_official_order():
    mix, square, norm = (1, 1, 32), (32, 32), (32,)
    channel_mix = [("time_mix_k", mix), ("time_mix_r", mix), ("key.weight", (64, 32)), ("receptance.weight", square),
                   ("value.weight", (32, 64))]  # fmt: skip
    mish_glu = [("time_mix_k", mix), ("time_mix_r", mix), ("aa.weight", (64, 32)), ("bb.weight", (64, 32)),
                ("value.weight", (32, 64))]  # fmt: skip
    time_mix = [*((f"time_mix_{x}", mix) for x in "kvrg"), ("time_decay", (2, 16)), ("time_faaaa", (2, 16)),
                *((f"{x}.weight", square) for x in ("receptance", "key", "value", "output", "gate")),
                ("ln_x.weight", norm), ("ln_x.bias", norm)]  # fmt: skip
    want = [
        ("copy_mask", (15, 15)),
        ("emb.weight", (20, 32)),
        ("blocks.0.pos_emb_x", (1, 4, 32)),
        ("blocks.0.pos_emb_y", (4, 1, 32)),
        *((f"blocks.0.{x}.{part}", norm) for x in ("ln1", "ln2", "ln0") for part in ("weight", "bias")),
        *((f"blocks.0.ffnPre.{x}", shape) for x, shape in channel_mix),
        *((f"blocks.0.ffn.{x}", shape) for x, shape in mish_glu),
        ("blocks.1.tiny_mask", (15, 15)),
        *((f"blocks.1.{x}.{part}", norm) for x in ("ln1", "ln2") for part in ("weight", "bias")),
        *((f"blocks.1.att.{x}", shape) for x, shape in time_mix),
        *((f"blocks.1.ffn.{x}", shape) for x, shape in mish_glu),
        ("blocks.1.tiny_ln.weight", norm),
        ("blocks.1.tiny_ln.bias", norm),
        ("blocks.1.tiny_q.weight", (5, 32)),
        ("blocks.1.tiny_k.weight", (5, 32)),
        ("blocks.1.tiny_v.weight", square),
        ("ln_out.weight", norm),
        ("ln_out.bias", norm),
        ("head.weight", (20, 32)),
        ("head_q.weight", (6, 32)),
        ("head_k.weight", (6, 32)),
    ]
    model = RWKV(config("all"))
    assert [(name, tuple(x.shape)) for name, x in model.state_dict().items()] == want
    assert list(parameter_shapes(config("all")).items()) == want


@pytest.mark.parametrize("recipe", ["head", "seed"])
def test_first_values(recipe):
    sizes = SIZES | ALL | {"head_qk": 40, "vocab_size": 64}
    weights = init_weights(ModelConfig(**sizes), seed=0, recipe=recipe)
    for name in ("blocks.0.ffnPre.value.weight", "blocks.0.ffnPre.receptance.weight", "blocks.1.ffn.value.weight",
                 "head_q.weight", "blocks.0.pos_emb_x", "blocks.0.pos_emb_y", "blocks.1.tiny_ln.bias"):  # fmt: skip
        assert not weights[name].any(), name
    assert (weights["blocks.1.tiny_ln.weight"] == 1).all()
    mask = weights["copy_mask"]
    assert [(i, j) for i in range(15) for j in range(15) if mask[i, j]] == [
        (i, j) for i in range(15) for j in range(i + 1)
    ]
    assert torch.equal(mask, weights["blocks.1.tiny_mask"])
    c = torch.arange(32) / 32
    torch.testing.assert_close(weights["blocks.0.ffnPre.time_mix_k"].flatten(), c)
    torch.testing.assert_close(weights["blocks.1.ffn.time_mix_r"].flatten(), c**0.5)

    tall = recipe == "seed"  # the recipe of 2023 scales up every matrix with more rows than columns
    for name, gain in [
        ("blocks.0.ffnPre.key.weight", math.sqrt(2) if tall else 1),
        ("blocks.1.ffn.aa.weight", math.sqrt(2) if tall else 1),
        ("blocks.1.ffn.bb.weight", math.sqrt(2) if tall else 1),
        ("blocks.1.tiny_q.weight", 1),
        ("blocks.1.tiny_v.weight", 1),
        ("head_k.weight", 0.1 * (math.sqrt(40 / 32) if tall else 1)),
    ]:
        singular = torch.linalg.svdvals(weights[name])
        torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=1e-5, msg=name)


@every_option
def test_counts_and_what_a_file_tells(option, tmp_path):
    model = model_of(option)
    assert model.config.n_params == sum(p.numel() for p in model.parameters())
    torch.save({name: x.bfloat16() for name, x in model.state_dict().items()}, tmp_path / "model.pth")
    told = {} if {"my_pos_emb", "head_qk", "tiny_att_dim"} & set(EVERY[option]) else {"ctx_len": 15}
    read = RWKV.from_checkpoint(tmp_path / "model.pth", dtype=torch.float64, **told)
    assert read.config == model.config
    for name, x in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[name], x.bfloat16().double(), rtol=0, atol=0)


def test_masks_of_a_file_may_be_missing_or_of_another_ctx_len():
    weights = trained_like(config("all", my_pos_emb=0))
    longer = config("all", my_pos_emb=0, ctx_len=40)
    check_weights(longer, weights)
    model = RWKV(longer, weights)
    assert torch.equal(model.copy_mask, torch.ones(40, 40).double().tril())
    without = {name: x for name, x in weights.items() if "mask" not in name}
    check_weights(longer, without)
    assert torch.equal(RWKV(longer, without)(tokens(1, 9))[0], model(tokens(1, 9))[0])
    with pytest.raises(ValueError, match="unknown keys: copy_mask"):
        check_weights(config("tiny_att"), trained_like(config("tiny_att")) | {"copy_mask": weights["copy_mask"]})
    del without["head_k.weight"]
    with pytest.raises(ValueError, match="missing keys: head_k.weight"):
        check_weights(longer, without)


def test_head_qk_is_a_vote_of_every_earlier_token():
    model, ids = model_of("head_qk"), tokens(2, 15)
    seen = watch(model, "ln_out", "head")
    logits = numpy(model(ids)[0])
    x, plain = numpy(seen["ln_out"][1]), numpy(seen["head"][1])
    q, k = x @ numpy(model.head_q.weight).T, x @ numpy(model.head_k.weight).T
    want = plain.copy()
    for b in range(2):
        for t in range(15):
            for s in range(t + 1):
                want[b, t, ids[b, s]] += q[b, t] @ k[b, s] / 6
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(logits, want, rtol=1e-12, atol=1e-12)


def test_many_small_votes_for_one_token_are_not_rounded_away():
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    logits = copy_logits(torch.zeros(1, 1000, 3).bfloat16(), ones / 256, ones, torch.full((1, 1000), 2))
    assert logits.dtype == torch.bfloat16 and not logits[..., :2].any()
    want = (torch.arange(1000) + 1) / 256  # added one by one in bfloat16 the sum stays at 1
    torch.testing.assert_close(logits[0, :, 2].float(), want, rtol=0.004, atol=0)


@pytest.mark.parametrize("option", ["tiny_att", "tiny_att_first"])
def test_tiny_attention_is_a_sum_over_earlier_tokens(option):
    model, ids = model_of(option), tokens(2, 15)
    name = f"blocks.{model.config.tiny_att_layer}"
    seen = watch(model, f"{name}.tiny_ln", name, "emb")
    model(ids)
    block = model.get_submodule(name)
    x, after, embedded = numpy(seen[f"{name}.tiny_ln"][0][0]), numpy(seen[name][1][0]), numpy(seen["emb"][1])
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * numpy(block.tiny_ln.weight) + numpy(block.tiny_ln.bias)
    q, k = normed @ numpy(block.tiny_q.weight).T, normed @ numpy(block.tiny_k.weight).T
    v = embedded @ numpy(block.tiny_v.weight).T  # of the tokens as they came, before ln0
    want = x.copy()
    for b in range(2):
        for t in range(15):
            for s in range(t + 1):
                want[b, t] += q[b, t] @ k[b, s] / math.sqrt(5) * v[b, s]
    assert np.abs(want - x).max() > 0.1
    np.testing.assert_allclose(after, want, rtol=1e-11, atol=1e-11)


def test_position_embedding_is_a_point_of_a_square():
    model, ids = model_of("my_pos_emb"), tokens(2, 15)
    seen = watch(model, "blocks.0.ln0", "blocks.0")
    model(ids)
    across, down = numpy(model.blocks[0].pos_emb_x), numpy(model.blocks[0].pos_emb_y)
    want = numpy(seen["blocks.0.ln0"][1]).copy()
    for p in range(15):
        want[:, p] += down[p // 4, 0] + across[0, p % 4]
    np.testing.assert_allclose(numpy(seen["blocks.0"][0][0]), want, rtol=1e-12, atol=1e-12)


def shifted(x, mix, t):
    before = x[:, t - 1] if t else 0.0
    return x[:, t] * mix + before * (1 - mix)


def test_pre_ffn_is_a_channel_mixing_in_place_of_time_mixing():
    model, ids = model_of("pre_ffn"), tokens(2, 15)
    assert not hasattr(model.blocks[0], "att") and not hasattr(model.blocks[1], "ffnPre")
    seen = watch(model, "blocks.0.ln1", "blocks.0.ln2")
    model(ids)
    x, normed = numpy(seen["blocks.0.ln1"][0][0]), numpy(seen["blocks.0.ln1"][1])
    w = {name: numpy(p) for name, p in model.blocks[0].ffnPre.named_parameters()}
    for t in range(15):
        k = np.maximum(shifted(normed, w["time_mix_k"][0, 0], t) @ w["key.weight"].T, 0) ** 2
        r = 1 / (1 + np.exp(-shifted(normed, w["time_mix_r"][0, 0], t) @ w["receptance.weight"].T))
        want = x[:, t] + r * (k @ w["value.weight"].T)
        np.testing.assert_allclose(numpy(seen["blocks.0.ln2"][0][0])[:, t], want, rtol=1e-11, atol=1e-11)


def test_mish_glu_is_a_product_of_two_networks():
    model, ids = model_of("mish_glu"), tokens(2, 15)
    seen = watch(model, "blocks.1.ffn")
    model(ids)
    x, got = numpy(seen["blocks.1.ffn"][0][0]), numpy(seen["blocks.1.ffn"][1][0])
    w = {name: numpy(p) for name, p in model.blocks[1].ffn.named_parameters()}
    for t in range(15):
        a = shifted(x, w["time_mix_k"][0, 0], t) @ w["aa.weight"].T
        b = shifted(x, w["time_mix_r"][0, 0], t) @ w["bb.weight"].T
        want = (a * b * np.tanh(np.log1p(np.exp(b)))) @ w["value.weight"].T
        np.testing.assert_allclose(got[:, t], want, rtol=1e-11, atol=1e-11)


@every_option
def test_in_pieces_and_token_by_token_as_all_at_once(option):
    model, ids = model_of(option), tokens(2, 15)
    with torch.no_grad():
        whole, last = model(ids)
        for pieces in ([1] * 15, [4, 1, 10]):
            state, parts = None, []
            for piece in ids.split(pieces, 1):
                logits, state = model(piece, state)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
            for x, y in zip(state, last, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(ids, full_output=False)[0], whole[:, -1:], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(ids, model.new_state(2))[0], whole, rtol=0, atol=0)
        later = model(tokens(2, 15, seed=7).where(torch.arange(15) > 9, ids))[0]
    torch.testing.assert_close(later[:, :10], whole[:, :10], rtol=1e-12, atol=1e-12)  # the future does not matter
    assert (later[:, 10:] - whole[:, 10:]).abs().max() > 0.01


@every_option
def test_rows_that_have_read_differently_go_on_together(option):
    model, ids = model_of(option), tokens(3, 1, seed=5)
    starts = [model(tokens(rows, T, seed=T))[1] for rows, T in ((1, 9), (2, 4))]
    together, state = model(ids, join_states(starts))
    apart = [model(ids[:1], starts[0]), model(ids[1:], starts[1])]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in apart]), rtol=1e-12, atol=1e-12)
    again, _ = model(ids, state)
    want = [model(ids[:1], apart[0][1])[0], model(ids[1:], apart[1][1])[0]]
    torch.testing.assert_close(again, torch.cat(want), rtol=1e-12, atol=1e-12)


def test_gradients_of_every_option_at_once():
    model, ids = model_of("all", dropout=0.2).eval(), tokens(1, 8)
    _, state = model(tokens(1, 6, seed=3))
    names, parameters = zip(*model.named_parameters(), strict=True)
    moving = [i for i, x in enumerate(state) if x.is_floating_point() and x.numel()]
    start = [state[i].detach().requires_grad_() for i in moving]

    def outputs(*values):
        before = list(state)
        for i, x in zip(moving, values[: len(moving)], strict=True):
            before[i] = x
        logits, after = torch.func.functional_call(
            model, dict(zip(names, values[len(moving) :], strict=True)), (ids, before)
        )
        return logits, *(after[i] for i in moving)

    assert torch.autograd.gradcheck(outputs, (*start, *parameters), fast_mode=True, atol=1e-6)


def test_state_and_positions_that_do_not_fit_are_named():
    model = model_of("all")
    _, state = model(tokens(2, 9))
    assert [tuple(x.shape) for x in state[6:]] == [(2, 5, 32), (2,), (2, 9), (2, 9, 6)]
    with pytest.raises(ValueError, match=r"3 x n_layer \+ 4 = 10 tensors"):
        model(tokens(2, 1), state[:6])
    with pytest.raises(ValueError, match="16 tokens, but my_pos_emb = 4 has places for 4 x 4 - 1 = 15"):
        model(tokens(2, 16))
    model(tokens(2, 6), state)
    with pytest.raises(ValueError, match="16 tokens"):
        model(tokens(2, 7), state)


@every_option
def test_half_precision(option):
    ids = tokens(2, 15)
    with torch.no_grad():
        exact, _ = model_of(option, torch.float32)(ids)
        with torch.autocast("cpu", torch.bfloat16):
            model = model_of(option, torch.float32)
            rounded, state = model(ids[:, :9])
            second, state = model(ids[:, 9:], state)
        half = model_of(option, torch.bfloat16)
        first, state = half(ids[:, :9])
        both = torch.cat((rounded, second), 1), torch.cat((first, half(ids[:, 9:], state)[0]), 1)
    for logits in both:
        assert logits.dtype == torch.bfloat16
        assert (logits - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_mish_glu_takes_mixes_in_another_format():
    """As fsdp in bfloat16 gives them on a GPU, where autocast leaves the output of a LayerNorm in float32."""
    layer = MishGLU(ModelConfig(n_layer=2, n_embd=64, vocab_size=20, my_testing="g"))
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter)
    x = torch.randn(1, 3, 64)
    exact, _ = layer(x, torch.zeros(1, 64))
    layer.time_mix_k.data, layer.time_mix_r.data = layer.time_mix_k.bfloat16(), layer.time_mix_r.bfloat16()
    found, _ = layer(x, torch.zeros(1, 64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
