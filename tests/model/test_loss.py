"""The loss, of logits and of a head in slices: the value and the gradient, by the formula written by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from rwkv_nb.model import elementwise
from rwkv_nb.model import loss as loss_module
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.loss import head_loss, l2wrap_cross_entropy, masked_cross_entropy, next_token_loss
from rwkv_nb.model.rwkv import RWKV


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


# ---- the head in slices


def head_example(dtype=torch.float64, B=2, T=9, D=6, V=13, mask=False):
    """x, weight, targets, and a mask or None."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    weight = 2 * torch.randn(V, D, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V, (B, T), generator=g)
    kept = torch.randint(0, 2, (B, T), generator=g).float() if mask else None
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, kept


@pytest.fixture(params=[1, 4, 100], ids=lambda rows: f"{rows} positions a slice")
def slices(request, monkeypatch):
    monkeypatch.setattr(loss_module, "_HEAD_SLICE", 13 * request.param)


@pytest.fixture(params=["kernel", "plain"])
def softmax(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(elementwise, "library", lambda: None)


@pytest.mark.usefixtures("slices", "softmax")
@pytest.mark.parametrize("upstream", [1.0, 0.25])
@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
def test_sliced_equals_plain(upstream, mask):
    x, weight, targets, kept = head_example(mask=mask)
    logits = F.linear(x, weight)
    plain = masked_cross_entropy(logits, targets, kept) if mask else l2wrap_cross_entropy(logits, targets)
    truth = torch.autograd.grad(upstream * plain, (x, weight))
    loss = head_loss(x, weight, targets, kept)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-13)
    for got, exact in zip(torch.autograd.grad(upstream * loss, (x, weight)), truth, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-16)


@pytest.mark.usefixtures("slices")
def test_sliced_by_hand():
    """The gradient by the formula of the logits, taken through the product."""
    x, weight, targets, _ = head_example()
    value, grad = by_hand(x.detach() @ weight.detach().T, targets, 0.5)
    loss = head_loss(x, weight, targets)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-13)
    (0.5 * loss).backward()
    torch.testing.assert_close(x.grad, grad @ weight.detach(), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(weight.grad, torch.einsum("btv,btd->vd", grad, x.detach()), rtol=1e-12, atol=1e-16)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
def test_sliced_gradients_by_finite_differences(mask, monkeypatch):
    monkeypatch.setattr(loss_module, "L2WRAP", 0.0)  # no derivative of the value has that term
    x, weight, targets, kept = head_example(mask=mask)
    assert torch.autograd.gradcheck(lambda x, weight: head_loss(x, weight, targets, kept), (x, weight))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sliced_products_in_half_precision(dtype):
    """The value is float32, and no further from the exact one than the products' rounding."""
    x, weight, targets, _ = head_example()
    exact = l2wrap_cross_entropy(F.linear(x, weight), targets)
    truth = torch.autograd.grad(1024 * exact, (x, weight))
    leaves = [t.detach().float().requires_grad_() for t in (x, weight)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = head_loss(*leaves, targets)
    close = 4 * torch.finfo(dtype).eps
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact.detach()), rel=close)
    for got, grad in zip(torch.autograd.grad(1024 * loss, leaves), truth, strict=True):
        assert got.dtype == torch.float32
        assert float((got - grad).norm() / grad.norm()) < close


def test_many_positions_in_float16():
    """A gradient is divided by the number of positions in float32: float16 would lose most of its digits."""
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(1, 20_000, 64, generator=g), 0.05 * torch.randn(64, 64, generator=g)
    targets = torch.randint(0, 64, (1, 20_000), generator=g)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    truth = torch.autograd.grad(l2wrap_cross_entropy(F.linear(*exact), targets), exact)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(*leaves, targets)
    for got, grad in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
        assert float((got - grad).norm() / grad.norm()) < 2e-3


@pytest.mark.parametrize("kept", [1, 3])
def test_few_answers_among_many_positions_in_float16(kept):
    """70,000 positions to an answer are more than float16 can hold, which ends at 65504."""
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(1, 70_000, 4, generator=g), torch.randn(5, 4, generator=g)
    targets, mask = torch.randint(0, 5, (1, 70_000), generator=g), torch.zeros(1, 70_000)
    mask[0, 123 : 123 + kept] = 1
    exact = [t.double().requires_grad_() for t in (x, weight)]
    value = masked_cross_entropy(F.linear(*exact), targets, mask)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.float16):
        loss = head_loss(*leaves, targets, mask)
    assert float(loss.detach()) == pytest.approx(float(value.detach()), rel=2e-3)
    truth = torch.autograd.grad(value, exact)
    for got, grad in zip(torch.autograd.grad(loss, leaves), truth, strict=True):
        assert torch.isfinite(got).all() and float((got - grad).norm() / grad.norm()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_in_half_precision_is_counted_in_float32(dtype):
    """So DeepSpeed hands it over. float16 ends at 65504, bfloat16 cannot tell 257 from 256."""
    x, weight = torch.zeros(1, 66_001, 2), torch.zeros(3, 2, requires_grad=True)
    targets, mask = torch.zeros(1, 66_001, dtype=torch.long), torch.ones(1, 66_001, dtype=dtype)
    for loss in (head_loss(x, weight, targets, mask), masked_cross_entropy(F.linear(x, weight), targets, mask)):
        assert float(loss.detach()) == pytest.approx(math.log(3), rel=1e-5)


def test_sliced_with_half_precision_weights():
    x, weight, targets, _ = head_example(torch.bfloat16)
    loss = head_loss(x, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_a_mask_of_zeros_leaves_only_the_pull():
    x, weight, targets, _ = head_example()
    loss = head_loss(x, weight, targets, torch.zeros(targets.shape))
    loss.backward()
    assert float(loss.detach()) == 0.0
    largest, at = (x.detach() @ weight.detach().T).max(-1)
    torch.testing.assert_close(x.grad, 1e-4 / 18 * largest[..., None] * weight.detach()[at], rtol=1e-12, atol=0)


def test_what_needs_no_gradient_gets_none():
    x, weight, targets, _ = head_example()
    both = torch.autograd.grad(head_loss(x, weight, targets), (x, weight))
    (only_x,) = torch.autograd.grad(head_loss(x, weight.detach(), targets), (x,))
    (only_weight,) = torch.autograd.grad(head_loss(x.detach(), weight, targets), (weight,))
    assert torch.equal(only_x, both[0]) and torch.equal(only_weight, both[1])
    with torch.no_grad():
        plain = l2wrap_cross_entropy(F.linear(x, weight), targets)
        assert float(head_loss(x, weight, targets)) == pytest.approx(float(plain), rel=1e-14)


def test_gradients_accumulate():
    x, weight, targets, _ = head_example()
    once = torch.autograd.grad(head_loss(x, weight, targets), (x, weight))
    loss = head_loss(x, weight, targets)
    loss.backward(retain_graph=True)
    loss.backward()  # through the same graph
    head_loss(x, weight, targets).backward()
    assert torch.equal(x.grad, 3 * once[0]) and torch.equal(weight.grad, 3 * once[1])


def test_logits_are_never_whole(monkeypatch):
    """Autograd keeps nothing of size n V, and no product makes it."""
    monkeypatch.setattr(loss_module, "_HEAD_SLICE", 300 * 5)
    x, weight, targets, _ = head_example(B=5, T=20, V=300)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            out = function(*arguments, **(named or {}))
            tensors = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor)]
            sizes.extend(o.untyped_storage().nbytes() for o in tensors)
            return out

    with Watch():
        head_loss(x, weight, targets).backward()
    assert max(sizes) <= 8 * max(300 * 6, 300 * 5) < 8 * 100 * 300


def test_head_loss_names_bad_input():
    x, weight, targets, _ = head_example()
    with pytest.raises(ValueError, match="from .* to 13.*tokens 0 to 12.*another tokenizer"):
        head_loss(x, weight, targets + 13 - targets.max())
    with pytest.raises(ValueError, match=r"got \(2, 9, 6\), \(13, 6\) and \(2, 8\)"):
        head_loss(x, weight, targets[:, :8])
    with pytest.raises(ValueError, match=r"got \(2, 9, 6\), \(13, 5\)"):
        head_loss(x, weight[:, :5], targets)
    with pytest.raises(ValueError, match=r"mask \(B, T\) = \(2, 9\) is needed, got \(18,\)"):
        head_loss(x, weight, targets, torch.ones(18))


@pytest.mark.parametrize("head_qk", [0, 8])
@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
def test_the_loss_of_a_model_either_way(mask, head_qk, monkeypatch):
    monkeypatch.setattr(loss_module, "SLICED_VOCAB", 13)
    calls, run = [], loss_module.head_loss
    monkeypatch.setattr(loss_module, "head_loss", lambda *arguments: calls.append(1) or run(*arguments))
    model = RWKV(ModelConfig(2, 32, 13, ctx_len=9, head_size_a=16, head_qk=head_qk)).double()
    _, _, targets, kept = head_example(mask=mask)
    found = []
    for sliced in (True, False):
        model.zero_grad()
        loss = next_token_loss(model, targets.flip(1), targets, kept, sliced=sliced)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)
    assert len(calls) == (head_qk == 0)
