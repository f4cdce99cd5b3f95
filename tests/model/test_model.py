"""The model against the `rwkv` package, against itself step by step, and against its checkpoints' names."""

import os
import subprocess
import sys

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV

CONFIG = ModelConfig(n_layer=3, n_embd=128, vocab_size=300)


def trained_like(config, seed=0, dtype=torch.float32):
    """Weights as after training: no zeros left, nothing symmetric, decays from slow to very fast."""
    g = torch.Generator().manual_seed(seed)
    weights = init_weights(config, seed=seed)
    for name, x in weights.items():
        scale = 1.0 if "time_decay" in name else 0.5 if name == "emb.weight" else 0.3 if "time" in name else 0.1
        x += scale * torch.randn(x.shape, generator=g)
    return {name: x.to(dtype) for name, x in weights.items()}


def tokens(B, T, config=CONFIG, seed=1):
    return torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


PACKAGE = """
import sys, torch
from rwkv.model import RWKV
data = torch.load(sys.argv[1] + "/tokens.pt", weights_only=True)
model = RWKV(sys.argv[1] + "/model", "cpu fp32", verbose=False)
logits, state = model.forward(data[:40], None, full_output=True)
last, state = model.forward(data[40:41], state)
torch.save({"logits": logits, "last": last, "state": [x.float() for x in state]}, sys.argv[1] + "/out.pt")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Logits and state of the installed `rwkv` package (its own process: it changes global settings of torch)."""
    folder = tmp_path_factory.mktemp("package")
    weights = trained_like(CONFIG)
    ids = tokens(1, 41)
    torch.save(weights, folder / "model.pth")
    torch.save(ids[0].tolist(), folder / "tokens.pt")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RWKV_")} | {"RWKV_JIT_ON": "0"}
    subprocess.run([sys.executable, "-c", PACKAGE, str(folder)], check=True, env=environment, capture_output=True)
    return folder / "model.pth", ids, torch.load(folder / "out.pt", weights_only=True)


def test_logits_and_state_of_the_rwkv_package(package):
    path, ids, theirs = package
    model = RWKV.from_checkpoint(path)
    with torch.no_grad():
        logits, state = model(ids[:, :40])
        last, state = model(ids[:, 40:], state)
    assert theirs["logits"].abs().max() > 1  # not a comparison of zeros
    torch.testing.assert_close(logits[0], theirs["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(last[0, 0], theirs["last"], rtol=0, atol=1e-4)
    assert len(state) == len(theirs["state"]) == 9
    for ours, other in zip(state, theirs["state"], strict=True):
        torch.testing.assert_close(ours[0], other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("n_layer", [1, 2])
def test_parallel_equals_token_by_token(n_layer, dtype, tolerance):
    config = ModelConfig(n_layer, 64, 50, head_size_a=16, dim_att=96, dim_ffn=160)
    model = RWKV(config, trained_like(config, dtype=dtype))
    ids = tokens(2, 50, config)
    with torch.no_grad():
        logits, last = model(ids)
        state, steps = None, []
        for t in range(50):
            step, state = model(ids[:, t : t + 1], state)
            steps.append(step)
        a, state_a = model(ids[:, :17])
        b, state_b = model(ids[:, 17:], state_a)
    assert logits.dtype == dtype and logits.shape == (2, 50, 50)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.cat((a, b), 1), logits, rtol=0, atol=tolerance)
    for x, y, z in zip(last, state, state_b, strict=True):
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(z, x, rtol=tolerance, atol=tolerance)
    assert [tuple(x.shape) for x in last] == [(2, 64), (2, 6, 16, 16), (2, 64)] * n_layer


def test_the_future_and_the_other_rows_do_not_matter():
    model = RWKV(CONFIG, trained_like(CONFIG))
    ids = tokens(2, 30)
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        a, b = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(a[0, :20], b[0, :20], rtol=0, atol=1e-6)
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-6)
    assert (a[0, 20:] - b[0, 20:]).abs().max() > 0.1


@pytest.mark.parametrize("T", [1, 5, 33])
def test_the_callers_state_is_not_changed(T):
    model = RWKV(CONFIG, trained_like(CONFIG))
    with torch.no_grad():
        _, state = model(tokens(2, 9))
        copies = [x.clone() for x in state]
        same_list = list(state)
        _, new = model(tokens(2, T, seed=5), state)
    assert all(x is y for x, y in zip(state, same_list, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(state, copies, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(new, state, strict=True))


def test_last_logits_alone():
    model = RWKV(CONFIG, trained_like(CONFIG))
    with torch.no_grad():
        full, _ = model(tokens(2, 9))
        last, _ = model(tokens(2, 9), full_output=False)
    torch.testing.assert_close(last, full[:, -1:])


def test_gradients_reach_every_weight_and_agree_with_a_difference():
    config = ModelConfig(2, 32, 20, head_size_a=16, dim_ffn=64)
    model = RWKV(config, trained_like(config, dtype=torch.float64))
    ids = tokens(2, 12, config)

    def loss():
        return model(ids)[0].log_softmax(-1)[..., 3].mean()

    loss().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        flat, where = p.data.view(-1), int(p.grad.abs().argmax())
        old = float(flat[where])
        with torch.no_grad():
            flat[where] = old + 1e-5
            up = float(loss().detach())
            flat[where] = old - 1e-5
            down = float(loss().detach())
        flat[where] = old
        assert (up - down) / 2e-5 == pytest.approx(float(p.grad.view(-1)[where]), rel=1e-5), name


def test_bfloat16_autocast_keeps_states_norms_and_the_residual_in_float32():
    model = RWKV(CONFIG, trained_like(CONFIG))
    ids = tokens(2, 40)
    with torch.no_grad():
        exact, _ = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(ids)
    assert logits.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in state)
    assert (logits - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_bfloat16_weights():
    model = RWKV(CONFIG, trained_like(CONFIG, dtype=torch.bfloat16))
    with torch.no_grad():
        logits, state = model(tokens(1, 20))
        step, state = model(tokens(1, 1), state)
    assert logits.dtype == step.dtype == torch.bfloat16 and step.isfinite().all()
    assert [x.dtype for x in state[:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_bfloat16_weights_under_the_autocast_of_a_gpu(monkeypatch):
    """FSDP keeps weights in bfloat16, and autocast on a GPU hands the results of layer norms on in float32."""
    norm = torch.nn.functional.layer_norm

    def in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        return norm(x.float(), shape, *(None if p is None else p.float() for p in (weight, bias)), eps)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", in_float32)
    weights, ids = trained_like(CONFIG, dtype=torch.bfloat16), tokens(2, 40)
    model = RWKV(CONFIG, weights)
    exact, _ = RWKV(CONFIG, {name: x.float() for name, x in weights.items()})(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(ids)
        logits.float().square().mean().backward()
    assert (logits - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_dropout_is_on_the_whole_residual_and_off_in_eval():
    config = ModelConfig(2, 64, 50, dropout=0.5)
    weights, ids = trained_like(config), tokens(1, 8, config)
    model = RWKV(config, weights)
    plain = RWKV(ModelConfig(2, 64, 50), weights)
    seen = []
    model.ln_out.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(ids)
        assert 0.3 < float((seen[0] == 0).float().mean()) < 0.7
        torch.testing.assert_close(model.eval()(ids)[0], plain(ids)[0])


def test_dropout_of_the_embedding_is_before_ln0_and_not_seen_by_tiny_attention():
    config = ModelConfig(2, 64, 50, dropout=0.5, tiny_att_dim=8, tiny_att_layer=1)
    model, seen = RWKV(config, trained_like(config)), {}
    for name in ("emb", "blocks.0.ln0", "blocks.0.ln2", "blocks.1.tiny_ln", "blocks.1.tiny_v"):
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(name, (x[0], y)))
    with torch.no_grad():
        model(tokens(2, 8, config))
    emb, dropped = seen["emb"][1], seen["blocks.0.ln0"][0]
    assert ((dropped == 0) | (dropped == emb / 0.5)).all()
    for name in ("blocks.0.ln0", "blocks.0.ln2", "blocks.1.tiny_ln"):
        assert 0.4 < float((seen[name][0] == 0).float().mean()) < 0.6, name
    assert torch.equal(seen["blocks.1.tiny_v"][0], emb)


def test_bad_input_is_named():
    model = RWKV(CONFIG, trained_like(CONFIG))
    with pytest.raises(ValueError, match="from 0 to 300.*vocab_size = 300.*another tokenizer"):
        model(torch.tensor([[0, 300]]))
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="3 x n_layer = 9 tensors for 2 rows"):
        model(tokens(2, 3), model.new_state(1))
    with pytest.raises(ValueError, match="got 2 tensors"):
        model(tokens(1, 3), model.new_state(1)[:2])


def test_new_state_is_the_fresh_start():
    model = RWKV(CONFIG, trained_like(CONFIG))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 3))[0], model(tokens(2, 3), model.new_state(2))[0], rtol=0, atol=0)
