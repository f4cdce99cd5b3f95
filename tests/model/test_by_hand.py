"""Layers with their gradients written out: against finite differences, and bit for bit against autograd's layers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rwkv_nb.model import by_hand, elementwise, products
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.layers import ChannelMix, TimeMix
from rwkv_nb.wkv import operator

B, T, D, FFN, N = 2, 70, 32, 64, 16
LAYERS = {"time_mix": TimeMix, "channel_mix": ChannelMix}
needs_a_compiler = pytest.mark.skipif(elementwise.library() is None, reason="NO COMPILER: no layer goes by hand")
pytestmark = needs_a_compiler


def layer_and_inputs(name, dtype=torch.float32, T=T, D=D, FFN=FFN, N=N):
    g = torch.Generator().manual_seed(len(name))
    with torch.device("meta"):
        layer = LAYERS[name](ModelConfig(1, D, 9, head_size_a=N, dim_ffn=FFN))
    layer = layer.to_empty(device="cpu").to(dtype)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(dtype) * 0.5
    x, before = torch.randn(B, T, D, generator=g), torch.randn(B, D, generator=g)
    inputs = [x, before] + [torch.randn(B, D // N, N, N, generator=g)] * (name == "time_mix")
    return layer, [t.to(dtype).requires_grad_() for t in inputs]


def results(layer, inputs, around=contextlib.nullcontext):
    """Outputs and all gradients; what comes from above is no constant and reaches the states too."""
    with around():
        outs = layer(*inputs)
    wanted = [t for t in (*inputs, *layer.parameters()) if t.requires_grad]
    above = [torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, wanted, above)]


def nodes(out):
    """The functions of autograd that the output hangs on."""
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


def by_hand_here(layer, inputs):
    return any(name in nodes(layer(*inputs)[0]) for name in ("_TimeMixBackward", "_ChannelMixBackward"))


def suits(layer, x, before):
    """The number of the format in which the layer goes by hand, or None."""
    return by_hand.number_format(x, before, tuple(layer.parameters())) if by_hand.suits(layer, x) else None


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@pytest.mark.parametrize("onednn", [False, True], ids=["pytorch", "onednn"])
@pytest.mark.parametrize("format", ["float32", "float64", "bfloat16 products"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits_as_by_parts(name, format, onednn, monkeypatch):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("NO ONEDNN")
    monkeypatch.setattr(products, "onednn", lambda: onednn)
    layer, inputs = layer_and_inputs(name, torch.float64 if format == "float64" else torch.float32)
    around = bfloat16 if format == "bfloat16 products" else contextlib.nullcontext
    with around():
        assert by_hand_here(layer, inputs)
    got = results(layer, inputs, around)
    monkeypatch.setattr(by_hand, "suits", lambda *_: False)
    with around():
        assert not by_hand_here(layer, inputs)
    for a, b in zip(got, results(layer, inputs, around), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if onednn and format == "float32":  # a product of one library against the same product of the same library
            assert torch.equal(a, b)
        else:  # autograd takes the transposed product for the gradient by a weight: sums in another order
            close = {"float32": 2e-6, "float64": 1e-14, "bfloat16 products": 2**-8}[format]
            assert float((a - b).abs().max()) <= close * float(b.abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_finite_differences(name):
    layer, inputs = layer_and_inputs(name, torch.float64, T=5)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    assert by_hand_here(layer, inputs)

    def call(*tensors):
        given = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(layer, given, tensors[: len(inputs)])

    if name == "channel_mix":  # relu^2 has no second derivative at 0, and none is met: differences hold to 1e-6
        assert (layer.key(inputs[0]).abs() > 1e-5).all()
    assert torch.autograd.gradcheck(call, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_within_half_a_float_of_float64(name):
    layer, inputs = layer_and_inputs(name)
    exact, wide = layer_and_inputs(name, torch.float64)
    for a, b in zip(results(layer, inputs), results(exact, wide), strict=True):
        assert float((a.double() - b).abs().max()) < 5e-6 * float(b.abs().max())


def test_only_the_gradients_that_are_asked_for(monkeypatch):
    for name in LAYERS:
        layer, inputs = layer_and_inputs(name)
        whole = results(layer, inputs)
        names = [key for key, _ in layer.named_parameters()]
        layer.key.weight.requires_grad_(False)
        layer.receptance.weight.requires_grad_(False)
        made, gradient = [], by_hand.gradient_by_weight
        monkeypatch.setattr(by_hand, "gradient_by_weight", lambda *t, made=made, f=gradient: made.append(1) or f(*t))
        some = results(layer, inputs)
        assert len(made) == {"time_mix": 3, "channel_mix": 1}[name]
        kept = [i for i, key in enumerate(names) if key not in ("key.weight", "receptance.weight")]
        rest = len(whole) - len(names)
        for a, b in zip(some, [*whole[:rest], *(whole[rest + i] for i in kept)], strict=True):
            assert torch.equal(a, b)
        monkeypatch.undo()


def test_a_loss_of_the_state_alone():
    layer, inputs = layer_and_inputs("time_mix")
    _, _, last = layer(*inputs)
    found = torch.autograd.grad(last.square().sum(), (*inputs, layer.key.weight, layer.output.weight))
    exact, wide = layer_and_inputs("time_mix", torch.float64)
    truth = torch.autograd.grad(exact(*wide)[2].square().sum(), (*wide, exact.key.weight, exact.output.weight))
    assert not found[-1].any()  # the output does not reach the state
    for a, b in zip(found[:-1], truth[:-1], strict=True):
        assert float((a.double() - b).abs().max()) < 5e-6 * float(b.abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_backward_twice_and_checkpoints(name):
    """What is overwritten is nobody else's: the same graph can be walked again, and be made again."""
    layer, inputs = layer_and_inputs(name)
    wanted = (*inputs, *layer.parameters())
    out = layer(*inputs)[0]
    above = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    kept = above.clone()
    first = torch.autograd.grad(out, wanted, above, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(out, wanted, above, allow_unused=True)
    again = torch.autograd.grad(
        checkpoint(layer, *inputs, use_reentrant=False)[0], wanted, above, allow_unused=True
    )
    assert torch.equal(above, kept)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", LAYERS)
def test_turned_inputs_and_states_of_another_format(name):
    layer, inputs = layer_and_inputs(name)
    x, before, *state = (t.detach() for t in inputs)
    truth = results(layer, [x.requires_grad_(), before.bfloat16().float().requires_grad_(), *state])
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = results(layer, [turned, before.bfloat16().requires_grad_(), *(s.mT.contiguous().mT for s in state)])
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        # the gradient by x_prev alone is in another format
        assert torch.equal(a, b) or (a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())), i


def exchanged(layer):
    layer.key = nn.Linear(D, layer.key.out_features, bias=False)


def without_a_weight(layer):
    """As an engine has it that keeps its weights packed."""
    layer.key = nn.Sequential(nn.Linear(D, layer.key.out_features, bias=False))


def listened_to(layer):
    layer.value.register_forward_hook(lambda *_: None)


def prepared(layer):
    layer.receptance.register_forward_pre_hook(lambda *_: None)


def watched_backwards(layer):
    layer.key.register_full_backward_hook(lambda *_: None)


def replaced_method(layer):
    layer.key.forward = layer.key.forward


def mixes_in_bfloat16(layer):
    layer.time_mix_k.data = layer.time_mix_k.data.bfloat16()


def mixes_as_fsdp_has_them(layer):
    """In bfloat16, and no parameters: views into one long vector."""
    view = layer.time_mix_k.data.bfloat16()
    del layer.time_mix_k
    layer.time_mix_k = view


CHANGES = [
    exchanged, without_a_weight, listened_to, prepared, watched_backwards, replaced_method, mixes_in_bfloat16,
    mixes_as_fsdp_has_them,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_was_changed_goes_by_its_parts(name, change):
    layer, inputs = layer_and_inputs(name)
    assert suits(layer, *inputs[:2]) == 0 and by_hand_here(layer, inputs)
    change(layer)
    assert not by_hand_here(layer, inputs)


def test_a_listener_keeps_what_it_heard():
    """Nothing is written in the place of what a part returned."""
    layer, inputs = layer_and_inputs("channel_mix")
    heard = []
    layer.key.register_forward_hook(lambda _, given, made: heard.append((given[0], made)))
    layer(*inputs)
    (given, made), = heard
    torch.testing.assert_close(made, given @ layer.key.weight.T)
    assert (made < 0).any()


def test_where_a_layer_goes_by_its_parts(monkeypatch):
    layer, (x, before, _) = layer_and_inputs("time_mix")
    with bfloat16():
        assert suits(layer, x, before) == 2
    with torch.autocast("cpu", torch.float16):
        assert suits(layer, x, before) is None
    with torch.no_grad():  # without gradients nothing is kept
        assert suits(layer, x, before) is None
    assert suits(layer, x[:, :1], before) is None  # a step of generation
    assert suits(layer, x.to("meta"), before) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert suits(layer, x, before) is None
    finally:
        handle.remove()
    assert suits(layer, x, before) == 0
    monkeypatch.setattr(elementwise, "library", lambda: None)  # no compiler
    assert suits(layer, x, before) is None


def test_under_torch_compile():
    layer, inputs = layer_and_inputs("channel_mix")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, layer(*inputs), rtol=1e-5, atol=1e-4)


def test_a_decay_that_is_no_number():
    layer, inputs = layer_and_inputs("time_mix")
    layer.time_decay.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="w, of shape .* holds NaN"):
        layer(*inputs)


def test_a_decay_beyond_all_bounds():
    """exp(w) is infinite: no gradient by it, and no NaN."""
    layer, inputs = layer_and_inputs("time_mix")
    layer.time_decay.data.fill_(100.0)
    assert all(found.isfinite().all() for found in results(layer, inputs))


def test_the_operator_is_what_runs(monkeypatch):
    """The backend that auto takes, in both directions."""
    taken = []
    for name in ("run_forward", "run_backward"):
        run = getattr(operator, name)
        monkeypatch.setattr(operator, name, lambda *given, run=run: taken.append(given[-2:]) or run(*given))
    layer, inputs = layer_and_inputs("time_mix", torch.float64)
    results(layer, inputs)
    assert taken[0] == ("chunked", True) and taken[1][1] == "chunked"  # in float64
    layer, inputs = layer_and_inputs("time_mix")
    results(layer, inputs)
    assert taken[2] == ("cpu", True) and taken[3][1] == "cpu"
