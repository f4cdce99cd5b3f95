"""The model on a GPU: loss, state and every gradient, for each option, against the same in float64 on a processor.

Its layers go by the definitions in plain PyTorch there, and WKV-5 by the CUDA kernels.
"""

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.loss import SLICED_VOCAB, next_token_loss, token_losses
from rwkv_nb.model.rwkv import RWKV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: needs one, and a torch that sees it"),
]
OPTIONS = {
    "none": {},
    "pre_ffn": {"pre_ffn": 1},
    "head_qk": {"head_qk": 6},
    "tiny_att": {"tiny_att_dim": 5, "tiny_att_layer": 1},
    "my_pos_emb": {"my_pos_emb": 7},
    "mish_glu": {"my_testing": "g"},
    "sliced head": {"vocab_size": SLICED_VOCAB},
    "heads of 16": {"head_size_a": 16},
    "heads of 24, without a kernel": {"head_size_a": 24, "n_embd": 96},
}
T = 48


def pair(option, **changes):
    """The same model twice: float64 on a processor, float32 on the GPU."""
    config = ModelConfig(**({"n_layer": 2, "n_embd": 128, "vocab_size": 96, "ctx_len": T} | OPTIONS[option] | changes))
    g = torch.Generator().manual_seed(0)
    weights = init_weights(config, seed=0)
    for name, x in weights.items():  # as after training: nothing is zero, nothing symmetric
        if "mask" not in name:
            x += (0.5 if name == "emb.weight" or "pos_emb" in name else 0.05) * torch.randn(x.shape, generator=g)
    models = RWKV(config, {name: x.double() for name, x in weights.items()}), RWKV(config, weights).cuda()
    return [model.train() for model in models]


def tokens(vocab_size, length=T):
    idx = torch.randint(0, vocab_size, (3, length + 1), generator=torch.Generator().manual_seed(1))
    return idx[:, :-1], idx[:, 1:]


def same(found, want, near, name=""):
    assert found.device.type == "cuda" and found.shape == want.shape, name
    if not want.numel():  # the state that a block without attention has
        return
    error = float((found.detach().cpu().double() - want).abs().max() / want.abs().max().clamp_min(1e-30))
    assert error < near, (name, error)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_loss_and_gradients_as_in_float64(option, grad_cp, masked):
    exact, model = pair(option)
    idx, targets = tokens(exact.config.vocab_size)
    mask = (torch.arange(T) % 3 > 0).expand(3, T).double() if masked else None
    model.grad_cp = grad_cp
    want = next_token_loss(exact, idx, targets, mask)
    want.backward()
    loss = next_token_loss(model, idx.cuda(), targets.cuda(), None if mask is None else mask.float().cuda())
    loss.backward()
    same(loss, want.detach(), 1e-5, "loss")
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        same(p.grad, q.grad, 1e-4, name)


@pytest.mark.parametrize("option", OPTIONS)
def test_in_pieces_from_a_state_as_at_once(option):
    exact, model = (each.eval() for each in pair(option))
    idx, targets = tokens(exact.config.vocab_size)
    with torch.no_grad():
        want, last = exact(idx)
        state, pieces = None, []
        for part in idx.cuda().split([17, 1, 30], dim=1):
            logits, state = model(part, state)
            pieces.append(logits)
        same(torch.cat(pieces, 1), want, 1e-4, "logits")
        for i, (found, s) in enumerate(zip(state, last, strict=True)):
            same(found, s, 1e-4, f"state {i}")
        same(token_losses(model, idx.cuda(), targets.cuda()), token_losses(exact, idx, targets), 1e-4, "token losses")


def test_the_gradient_through_a_state():
    exact, model = pair("none")
    idx, targets = tokens(96)
    want, found = [], []
    for each, place, out in ((exact, "cpu", want), (model, "cuda", found)):
        first, state = each(idx[:, :20].to(place))
        second, _ = each(idx[:, 20:].to(place), state)
        logits = torch.cat([first, second], 1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(place).flatten())
        out += torch.autograd.grad(loss, list(each.parameters()))
    for got, grad, (name, _) in zip(found, want, exact.named_parameters(), strict=True):
        same(got, grad, 1e-4, name)


def test_bfloat16_under_autocast_is_near():
    exact, model = pair("none", vocab_size=SLICED_VOCAB)
    idx, targets = tokens(SLICED_VOCAB)
    want = next_token_loss(exact, idx, targets)
    want.backward()
    with torch.autocast("cuda", torch.bfloat16):
        loss = next_token_loss(model, idx.cuda(), targets.cuda())
    loss.backward()
    same(loss, want.detach(), 1e-2, "loss")
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        off = (p.grad.cpu().double() - q.grad).norm() / q.grad.norm()
        assert off < 0.1, (name, float(off))
