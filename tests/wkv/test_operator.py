"""The operator as PyTorch sees it: registration, autograd, torch.compile, the choice of a backend, bad input."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import rwkv_nb.wkv as room
from rwkv_nb.wkv import backends, operator, wkv5, wkv5_reference
from rwkv_nb.wkv.build import BuildError

NAMES = ("y", "last", "r", "k", "v", "w", "u", "state")
PLAIN = ["reference", "chunked"]


def inputs(B=2, T=37, H=2, N=8, dtype=torch.float64, low=-6.0, high=1.0, grad=True):
    g = torch.Generator().manual_seed(B * T + N)
    r, k, v = (torch.randn(B, T, H, N, generator=g, dtype=torch.float64) for _ in range(3))
    w = torch.empty(H, N, dtype=torch.float64).uniform_(low, high, generator=g)
    u, state = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((H, N), (B, H, N, N)))
    return [x.to(dtype).requires_grad_(grad) for x in (r, k, v, w, u, state)]


def outputs_and_gradients(function, tensors):
    y, last = function(*tensors)
    g = torch.Generator().manual_seed(5)
    directions = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in (y, last)]
    return [y, last, *torch.autograd.grad([y, last], tensors, directions)]


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("T", [0, 1, 2, 45])
def test_gradients_are_those_of_autograd_through_the_loop(backend, T):
    tensors = inputs(T=T)
    got = outputs_and_gradients(lambda *x: wkv5(*x, backend=backend), tensors)
    y, last = wkv5_reference(*tensors)
    for name, a, b in zip(NAMES, got, [y, last], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    if T:
        want = outputs_and_gradients(wkv5_reference, tensors)
        for name, a, b in zip(NAMES, got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", PLAIN)
def test_gradcheck(backend):
    tensors = inputs(1, 5, 2, 3, low=-3)
    assert torch.autograd.gradcheck(lambda *x: wkv5(*x, backend=backend), tensors, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [*PLAIN, "cpu"])
@pytest.mark.parametrize("T", [1, 33])
def test_opcheck(backend, T):
    if reason := operator.BACKENDS[backend].why_not():
        pytest.skip(f"backend {backend}: {reason}")
    tensors = inputs(T=T, dtype=torch.float32)
    torch.library.opcheck(operator._forward, (*tensors, backend, True))
    plain = [x.detach() for x in tensors]
    torch.library.opcheck(operator._forward, (*plain, backend, False))
    y, last, saved = operator._forward(*plain, backend, True)
    torch.library.opcheck(operator._backward, (*plain, saved, torch.ones_like(y), torch.ones_like(last), backend))


@pytest.mark.parametrize("only", ["y", "state"])
def test_gradient_of_one_output_alone(only):
    tensors = inputs()
    found = []
    for function in (wkv5, wkv5_reference):
        y, last = function(*tensors)
        found.append(torch.autograd.grad((y if only == "y" else last).square().sum(), tensors, allow_unused=True))
    for name, a, b in zip(NAMES[2:], *found, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-11, atol=1e-11, msg=name)


def test_one_node_under_torch_compile():
    tensors = inputs(dtype=torch.float32)
    compiled = torch.compile(lambda *x: wkv5(*x), backend="aot_eager", fullgraph=True)
    got, want = (outputs_and_gradients(f, tensors) for f in (compiled, wkv5))
    for name, a, b in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_another_length_under_torch_compile():
    """From the second length on torch.compile has T as a symbol, of which the choice of a backend must not depend."""
    compiled = torch.compile(lambda *x: wkv5(*x)[0], backend="aot_eager", fullgraph=True)
    for T in (20, 30, 40):
        tensors = inputs(T=T, dtype=torch.float32, grad=False)
        assert torch.equal(compiled(*tensors), wkv5(*tensors)[0])


def test_without_gradients_nothing_is_kept():
    tensors = inputs(grad=False)
    y, last = wkv5(*tensors)
    assert not y.requires_grad and not last.requires_grad
    assert operator._forward(*tensors, "chunked", False)[2].numel() == 0


def test_state_out_is_never_the_state_in():
    tensors = inputs(T=0)
    for backend in PLAIN:
        _, last = wkv5(*tensors, backend=backend)
        assert torch.equal(last, tensors[-1]) and last.data_ptr() != tensors[-1].data_ptr()


def test_backends_name_what_is_missing():
    found = backends()
    assert list(found)[:2] == PLAIN and found["reference"] == found["chunked"] == "available"
    assert all(isinstance(text, str) and text and "\n" not in text for text in found.values())
    if not torch.cuda.is_available() and "cuda" in found:
        assert found["cuda"] != "available"


@pytest.fixture
def nothing_asked():
    """Nobody has asked yet whether a backend is ready."""
    room._ready.cache_clear()
    yield
    room._ready.cache_clear()


@pytest.fixture
def broken_compiler(monkeypatch, nothing_asked):
    """A machine whose C++ compiler fails."""

    def prepare(N, dtype, device):
        raise BuildError("wkv5_cpu: g++ failed with exit code 1; see wkv5.log")

    module = SimpleNamespace(why_not=lambda device: None, supports=lambda N: None, prepare=prepare)
    monkeypatch.setitem(operator.BACKENDS, "cpu", module)


def test_without_a_compiler_auto_takes_chunks_and_says_so_once(broken_compiler):
    tensors = inputs(dtype=torch.float32)
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower: wkv5_cpu: g"):
        y, _ = wkv5(*tensors)
    assert torch.equal(y, wkv5(*tensors, backend="chunked")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wkv5(*tensors)


@pytest.mark.usefixtures("nothing_asked")
def test_each_head_size_and_format_is_asked_for_itself(monkeypatch):
    """What compiles for one may fail for another: auto takes chunks for that one alone, and says so once."""
    if reason := operator.BACKENDS["cpu"].why_not():
        pytest.skip(f"backend cpu: {reason}")

    def prepare(N, dtype, device):
        if (N, dtype) != (8, torch.float32):
            raise BuildError(f"no kernel for {N} channels of {dtype}; see wkv5.log")

    monkeypatch.setattr(operator.BACKENDS["cpu"], "prepare", prepare)
    for N, dtype, wanted in ((8, torch.float32, "cpu"), (8, torch.float16, "chunked"), (4, torch.float32, "chunked")):
        r, k, v, *rest = (x.detach() for x in inputs(N=N, dtype=torch.float32))
        tensors = [x.to(dtype) for x in (r, k, v)] + rest
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = [wkv5(*tensors)[0] for _ in range(2)]
        assert [f"{N} channels of {dtype};" in str(w.message) for w in said] == [True] * (wanted == "chunked")
        assert all(torch.equal(y, wkv5(*tensors, backend=wanted)[0]) for y in found)


def bad(expected, change, backend="auto"):
    """wkv5 refuses the inputs after `change` and says `expected`, a regular expression."""
    given = dict(zip(["r", "k", "v", "w", "u", "state"], inputs(dtype=torch.float32, grad=False), strict=True))
    given.update(change(given))
    with pytest.raises(ValueError, match=expected):
        wkv5(**given, backend=backend)


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        (r"r has shape \(2, 37, 16\); expected \(B, T, H, N\)", lambda x: {"r": x["r"].flatten(2)}),
        (r"k has shape \(2, 36, 2, 8\); expected \(2, 37, 2, 8\)", lambda x: {"k": x["k"][:, 1:]}),
        (r"v has shape \(1, 37, 2, 8\)", lambda x: {"v": x["v"][:1]}),
        (r"w has shape \(16,\); expected \(2, 8\)", lambda x: {"w": x["w"].flatten()}),
        (r"u has shape \(8,\); expected \(2, 8\)", lambda x: {"u": x["u"][0]}),
        (r"state has shape \(2, 8, 8\); expected \(2, 2, 8, 8\)", lambda x: {"state": x["state"][0]}),
        (r"v, of shape .*, is torch.float64; expected torch.float32, as r is", lambda x: {"v": x["v"].double()}),
        (r"k, of shape .*, is torch.bfloat16; expected torch.float32", lambda x: {"k": x["k"].bfloat16()}),
        (r"r, of shape .*, is torch.int64; expected floating point", lambda x: {"r": x["r"].long()}),
        (r"w, of shape \(2, 8\), is torch.int32; expected floating point", lambda x: {"w": x["w"].int()}),
        (r"k, .* is on meta; expected cpu", lambda x: {"k": x["k"].to("meta")}),
        (r"r, of shape .*, has strides .* call r.contiguous\(\)", lambda x: {"r": x["r"].mT.contiguous().mT}),
        (r"state, of shape .*, has strides", lambda x: {"state": x["state"].mT}),
        (r"w, of shape \(2, 8\), holds NaN; expected the raw time_decay", lambda x: {"w": x["w"] * float("nan")}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(expected, change):
    bad(expected, change)


def test_bad_backends():
    bad("unknown backend 'cudnn'; choose from auto, reference, chunked", lambda x: {}, backend="cudnn")
