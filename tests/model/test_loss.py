"""l2wrap_cross_entropy: the value and the gradient, by the formula written by hand."""

import pytest
import torch

from rwkv_nb.model import loss as loss_module
from rwkv_nb.model.loss import l2wrap_cross_entropy


def example(dtype=torch.float64, B=2, T=5, V=7):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, T, V, generator=g, dtype=torch.float64)).to(dtype)
    return logits.requires_grad_(), torch.randint(0, V, (B, T), generator=g)


def by_hand(logits, targets, upstream=1.0):
    B, T, V = logits.shape
    n = B * T
    grad = torch.zeros(B, T, V, dtype=torch.float64)
    value = 0.0
    for b in range(B):
        for t in range(T):
            x = logits[b, t].detach().double()
            p = torch.exp(x) / torch.exp(x).sum()
            value -= float(torch.log(p[targets[b, t]])) / n
            grad[b, t] = upstream * p / n
            grad[b, t, targets[b, t]] -= upstream / n
            grad[b, t, x.argmax()] += 1e-4 * x.max() / n  # not multiplied by what comes from above
    return value, grad


@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("slice_size", [1 << 20, 8])
def test_value_and_gradient(upstream, slice_size, monkeypatch):
    monkeypatch.setattr(loss_module, "_SLICE", slice_size)
    logits, targets = example()
    value, grad = by_hand(logits, targets, upstream)
    loss = l2wrap_cross_entropy(logits, targets)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-14)
    (upstream * loss).backward()
    torch.testing.assert_close(logits.grad, grad, rtol=1e-12, atol=1e-15)


def test_half_precision_logits_give_a_float32_loss():
    logits, targets = example(torch.bfloat16)
    value, grad = by_hand(logits, targets)
    loss = l2wrap_cross_entropy(logits, targets.int())
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(value, rel=1e-6)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad, grad.bfloat16(), rtol=0.01, atol=1e-6)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = l2wrap_cross_entropy(logits, torch.tensor([[1]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4)
    torch.testing.assert_close(logits.grad[0, 0], torch.tensor([2.0, -1.0, 0.0]))  # 1 - 0, plus 1e-4 x 1e4


def test_bad_input_is_named():
    logits, targets = example()
    with pytest.raises(ValueError, match="from .* to 7.*tokens 0 to 6.*another tokenizer"):
        l2wrap_cross_entropy(logits, targets.fill_(7))
    with pytest.raises(ValueError, match=r"got \(2, 5, 7\) and \(2, 4\)"):
        l2wrap_cross_entropy(logits, targets[:, :4])
