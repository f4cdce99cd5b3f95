"""The GPU backend. Without a GPU: what it says, what it compiles, and that it hands over the right pointers. With one:
right for every number format, on a stream of its own, and compiled. `test_backends.py` runs it through `wkv5` too."""

from __future__ import annotations

import ctypes
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rwkv_nb.wkv as room
from rwkv_nb.wkv import build, cuda, launching, operator, wkv5, wkv5_reference

GPU = pytest.mark.skipif(cuda.why_not() is not None, reason=f"not run: {cuda.why_not()}")
KERNELS = ["plain", "chunked"]


def inputs(B=2, T=37, H=2, N=64, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(T)
    r, k, v = (torch.randn(B, T, H, N, generator=g).to(device, dtype) for _ in range(3))
    w = torch.empty(H, N).uniform_(-6, 1, generator=g)
    w[::2] -= 2  # in every other head all channels are slow
    w = w.to(device)
    u, state = (torch.randn(*shape, generator=g).to(device) for shape in ((H, N), (B, H, N, N)))
    return [r, k, v, w, u, state]


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU as far as torch and the compiler's name go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=4321))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(build, "find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    monkeypatch.setattr(cuda, "_libraries", {})
    room._ready.cache_clear()
    yield monkeypatch
    room._ready.cache_clear()


def test_each_thing_that_may_be_missing_has_its_line(machine):
    assert cuda.why_not() is None
    machine.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    assert "compute capability 7.0, nvcc needs 7.5" in cuda.why_not()
    machine.setattr(build, "find_nvcc", lambda: None)
    assert "nvcc was not found: install the CUDA toolkit" in cuda.why_not()
    machine.setattr(torch.cuda, "is_available", lambda: False)
    machine.setattr(torch.version, "cuda", None)
    assert "CPU build" in cuda.why_not()
    machine.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in cuda.why_not()
    assert cuda.supports(64) is None and "head size 24 is none of" in cuda.supports(24)


def test_it_compiles_for_this_architecture_head_size_and_format_alone(machine):
    asked = {}

    def load(name, sources, flags, compiler):
        asked.update(sources=sources, flags=flags, compiler=compiler)
        raise build.BuildError("wkv5_cuda: nvcc failed with exit code 2; see wkv5.log")

    machine.setattr(build, "load", load)
    with pytest.raises(build.BuildError, match="nvcc failed"):
        cuda.prepare(64, torch.float32, torch.device("cuda", 0))
    assert asked["sources"] == ["launch.cu"] and asked["compiler"] == "/opt/cuda/bin/nvcc"
    only = {"-DWKV5_HEAD_SIZE=64", "-DWKV5_DTYPE=0", "-DWKV5_CHUNKED"}
    assert {"-gencode=arch=compute_90,code=sm_90", *only} <= set(asked["flags"])
    assert not any("fast_math" in flag for flag in asked["flags"])
    assert cuda.why_not() == "wkv5_cuda: nvcc failed with exit code 2; see wkv5.log"  # from now on
    asked.clear()
    with pytest.raises(build.BuildError, match="nvcc failed"):
        cuda.prepare(64, torch.float32, torch.device("cuda", 0))
    assert not asked  # a compiler that failed is not asked again


class Counting:
    """A library whose functions count their calls and return codes."""

    def __init__(self, code=0):
        self.code, self.calls = code, []

    @staticmethod
    def wkv5_error(code):
        return b"CUDA driver version is insufficient for CUDA runtime version"

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            assert all(arguments[5:-1][i].value for i in range(len(arguments) - 6))  # real memory
            return self.code

        return call


CPU = torch.device("cpu")


def test_kernels_that_compile_and_do_not_launch_are_no_kernels(machine):
    """A driver older than nvcc: known only from a launch."""
    library = Counting(code=35)
    machine.setattr(build, "load", lambda *arguments, **named: library)
    with pytest.raises(build.BuildError, match="compiled but do not run .*driver version is insuffic.*: update the"):
        cuda.prepare(64, torch.bfloat16, CPU)
    assert library.calls == ["wkv5_chunked_forward"]
    assert "do not run" in cuda.why_not() and "do not run" in cuda.why_not(torch.device("cuda", 0))
    with pytest.raises(build.BuildError, match="do not run"):
        cuda.forward(*inputs(dtype=torch.bfloat16), None)
    library.code = 0
    cuda.prepare(64, torch.float32, CPU)  # something runs: no word against the whole backend
    assert library.calls[1:] == ["wkv5_chunked_forward", "wkv5_chunked_backward"] and cuda.why_not() is None


def test_auto_takes_chunks_where_kernels_do_not_launch(machine):
    machine.setattr(build, "load", lambda *arguments, **named: Counting(code=35))
    machine.setitem(operator.BACKENDS, "cpu", cuda)  # as if tensors of the processor were on a GPU
    tensors = inputs()
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower: the CUDA kernels were compiled but do not"):
        y, _ = wkv5(*tensors)
    assert torch.equal(y, wkv5(*tensors, backend="chunked")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wkv5(*tensors)


def test_a_trial_launch_is_real_even_while_somebody_traces(machine):
    library = Counting()
    machine.setattr(build, "load", lambda *arguments, **named: library)
    with FakeTensorMode():
        cuda.prepare(32, torch.float16, CPU)
    assert library.calls == ["wkv5_chunked_forward", "wkv5_chunked_backward"]


def test_each_card_is_asked_for_itself(machine):
    """Two cards, the second too old: what the first can do says nothing about it."""
    old, new = torch.device("cuda", 1), torch.device("cuda", 0)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    capability = {0: (9, 0), 1: (7, 0), new: (9, 0), old: (7, 0), None: (9, 0)}
    machine.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[device])
    assert cuda.why_not() is None and cuda.why_not(new) is None
    assert "compute capability 7.0, nvcc needs 7.5" in cuda.why_not(old)
    machine.setattr(cuda, "prepare", lambda N, dtype, device: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert room._choose(new, torch.float32, 64) == "cuda"
    with pytest.warns(UserWarning, match="compute capability 7.0"):
        assert room._choose(old, torch.float32, 64) == "chunked"


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "plain"), ((8, 0), "chunked"), ((9, 0), "chunked")])
def test_pointers_sizes_and_stream_are_handed_over_in_order(machine, capability, wanted):
    calls = []

    class Library:
        wkv5_error = staticmethod(lambda code: b"an illegal memory access was encountered")

        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, [a.value for a in arguments]))
                return 700 if "backward" in name else 0

            return call

    machine.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    machine.setattr(cuda, "_library", lambda N, dtype, capability: Library())
    tensors = inputs(dtype=torch.bfloat16)
    y, last = cuda.forward(*tensors, None)
    [(name, arguments)] = calls
    assert name == f"wkv5_{wanted}_forward"
    assert arguments == [2, 64, 2, 37, 2, *(x.data_ptr() for x in (*tensors, y, last)), 4321]
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    with pytest.raises(launching.LaunchError, match=f"wkv5_{wanted}_backward on cpu failed with code 700: an illegal"):
        cuda.backward(*tensors, None, y, last)
    assert calls[-1][1][5:13] == [x.data_ptr() for x in (*tensors, y, last)] and len(calls[-1][1]) == 5 + 15 + 1
    cuda.forward(*tensors, None, kernel="plain")
    assert calls[-1][0] == "wkv5_plain_forward"


def test_an_odd_address_is_copied_to_an_even_one(machine):
    """A slice of a buffer may be contiguous and yet start between two multiples of 16 bytes."""
    seen = []

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: seen.extend(a.value for a in arguments[5:-1]) or 0

    machine.setattr(cuda, "_library", lambda N, dtype, capability: Library())
    r, *rest = inputs(dtype=torch.bfloat16)
    odd = torch.cat([r.new_zeros(1), r.flatten()])[1:].view(r.shape)
    assert odd.is_contiguous() and odd.data_ptr() % 16 == 2
    cuda.forward(odd, *rest, None)
    assert len(seen) == 8 and all(pointer % 16 == 0 for pointer in seen)


def test_the_library_has_every_function_that_is_called():
    if (nvcc := build.find_nvcc()) is None:
        pytest.skip(f"not run: nvcc was not found: {build.NVCC_REMEDY}")
    flags = [*cuda.FLAGS, "-gencode=arch=compute_80,code=sm_80", "-DWKV5_HEAD_SIZE=16", "-DWKV5_DTYPE=0"]
    flags += ["-DWKV5_CHUNKED"]
    path = build.build("wkv5_cuda", ("launch.cu",), tuple(flags), nvcc)
    library = ctypes.CDLL(str(path))  # the CUDA runtime is inside: no driver is needed to load it
    assert all(getattr(library, f"wkv5_{kernel}_{f}") for kernel in KERNELS for f in ("forward", "backward"))


def outputs(tensors, kernel, gy, glast):
    y, last = cuda.forward(*tensors, None, kernel=kernel)
    return [y, last, *cuda.backward(*tensors, None, gy, glast, kernel=kernel)]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [0, 1, 16, 333])
def test_on_the_gpu_against_float64(kernel, dtype, T):
    tensors = inputs(T=T, dtype=dtype, device="cuda")
    exact = [x.double().cpu().requires_grad_() for x in tensors]
    y, last = wkv5_reference(*exact)
    gy, glast = torch.randn_like(tensors[0]), torch.randn_like(tensors[5])
    directions = [gy.double().cpu(), glast.double().cpu()]
    grads = torch.autograd.grad([y, last], exact, directions, allow_unused=True, materialize_grads=True)
    for i, (got, want) in enumerate(zip(outputs(tensors, kernel, gy, glast), (y, last, *grads), strict=True)):
        tf32 = kernel == "chunked" and (dtype == torch.float16 or dtype == torch.bfloat16 and i < 2)
        two = kernel == "chunked" and dtype == torch.bfloat16
        rounding = torch.finfo(got.dtype).eps / 2 + (2e-3 if tf32 else 5e-5 if two else 1e-5)
        bound = rounding * float(want.abs().max()) if want.numel() else 0
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=bound)


@pytest.mark.gpu
@GPU
def test_on_a_stream_of_its_own():
    tensors = inputs(device="cuda")
    want, _ = wkv5(*tensors, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got, _ = wkv5(*tensors, backend="cuda")
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@GPU
def test_under_torch_compile():
    tensors = [x.requires_grad_() for x in inputs(device="cuda")]
    compiled = torch.compile(lambda *x: wkv5(*x)[0], fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), wkv5(*tensors)[0], rtol=1e-5, atol=1e-5)
