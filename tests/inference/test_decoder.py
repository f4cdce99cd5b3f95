"""The C++ step against the model in PyTorch, and packed matrices against their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.inference import decoder as decoder_module
from rwkv_nb.inference.buffers import Pages, Recycled
from rwkv_nb.inference.decoder import Decoder, product
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.packing import GROUP, STORAGES, pack
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.wkv import build

pytestmark = pytest.mark.usefixtures("one_thread")
NO_COMPILER = pytest.mark.skipif(decoder_module.why_not() is not None, reason=str(decoder_module.why_not()))


def make_model(n_layer=2, n_embd=64, vocab_size=77, dtype=torch.float32, **options):
    """A model whose every parameter matters, in float32 rounded to bfloat16, as official files are."""
    config = ModelConfig(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, **options)
    g = torch.Generator().manual_seed(1)
    weights = init_weights(config, seed=0)
    noisy = {name: x + 0.1 * torch.randn(x.shape, generator=g) for name, x in weights.items()}
    return RWKV(config, {name: x.bfloat16().to(dtype) for name, x in noisy.items()}).eval()


def walk(step, ids, state):
    """Logits (B, T, V) of one step after the other, and the last state."""
    found = []
    for t in range(ids.shape[1]):
        logits, state = step(ids[:, t], state)
        found.append(logits)
    return torch.stack(found, 1), state


def truth(model, ids, storage="float32"):
    """The same in float64 by the model itself, its matrices rounded as the storage rounds them."""
    weights = {name: x.double() for name, x in model.state_dict().items()}
    for name, x in weights.items():
        if x.dim() == 2 and name.endswith(".weight") and name != "emb.weight":
            weights[name] = pack(x.float(), storage).unpack().double()
    double = RWKV(model.config, weights).eval()
    with torch.no_grad():
        return double(ids, double.new_state(ids.shape[0]))


def close(got, want, tolerance=2e-6):
    return float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@NO_COMPILER
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("B", [1, 2, 3, 7, 8, 19])
def test_equals_the_model_in_float64(storage, B):
    model = make_model()
    ids = torch.randint(0, 77, (B, 4), generator=torch.Generator().manual_seed(B))
    got, state = walk(Decoder(model, storage).step, ids, model.new_state(B))
    want, want_state = truth(model, ids, storage)
    assert close(got, want)
    assert all(close(a, b, 4e-6) for a, b in zip(state, want_state, strict=True))


@NO_COMPILER
@pytest.mark.parametrize(
    ("storage", "products", "tolerance"),
    [
        ("float32", "float32", 2e-6),
        ("bfloat16", "float32", 2e-6),
        ("int8", "float32", 2e-6),
        ("int8", "bfloat16", 0.05),
    ],
)
def test_a_prompt_is_read_as_token_by_token(storage, products, tolerance):
    model = make_model(n_layer=3)
    decoder = Decoder(model, storage, products)
    ids = torch.randint(0, 77, (2, 19), generator=torch.Generator().manual_seed(5))
    want, want_state = truth(model, ids, storage)
    logits, state = decoder(ids, None)
    assert logits.shape == (2, 19, 77) and close(logits, want, tolerance)
    first, half = decoder(ids[:, :7], None, full_output=False)
    assert first.shape == (2, 1, 77) and close(first[:, 0], want[:, 6], tolerance)
    for t in range(7, 19):  # mixed: a prompt, then steps
        one, half = decoder(ids[:, t : t + 1], half)
        assert one.shape == (2, 1, 77) and close(one[:, 0], want[:, t], tolerance)
    assert all(close(a, b, 2 * tolerance) for a, b in zip(half, want_state, strict=True))
    assert all(close(a, b, 2 * tolerance) for a, b in zip(state, want_state, strict=True))


@NO_COMPILER
def test_it_writes_what_the_model_writes():
    model = make_model(n_layer=3)
    tokenizer = CharTokenizer(chr(48 + i) for i in range(77))
    texts = [
        "".join(generate(m, tokenizer, "0123", 40, generator=torch.Generator().manual_seed(7)))
        for m in (model, Decoder(model, "float32"), Decoder(model, "bfloat16"))
    ]
    assert texts[0] == texts[1] == texts[2]


@NO_COMPILER
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 96, "head_size_a": 32, "dim_ffn": 160},  # rows that are no whole groups of 64
        {"n_embd": 64, "dim_att": 128, "n_layer": 3},  # more heads than n_embd has room for
        {"n_embd": 128, "head_size_a": 16, "head_size_divisor": 4, "vocab_size": 5},
    ],
)
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_other_sizes(sizes, storage):
    model = make_model(**sizes)
    ids = torch.randint(0, model.config.vocab_size, (3, 4), generator=torch.Generator().manual_seed(0))
    got, _ = walk(Decoder(model, storage).step, ids, model.new_state(3))
    assert close(got, truth(model, ids, storage)[0])


@NO_COMPILER
def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    model = make_model(n_layer=3)
    decoder = Decoder(model, "float32")
    ids = torch.tensor([[1, 2]])
    want, _ = walk(decoder.step, ids, model.new_state())
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(walk(decoder.step, ids, model.new_state())[0], want), threads
    decoder._step.parallel = decoder._step.team = None  # without torch's own pool
    assert torch.equal(walk(decoder.step, ids, model.new_state())[0], want)


@NO_COMPILER
def test_the_state_given_is_not_changed_and_rows_do_not_mix():
    model = make_model()
    decoder, ids = Decoder(model, "bfloat16"), torch.tensor([3, 5, 9])
    g = torch.Generator().manual_seed(2)
    state = [torch.randn(x.shape, generator=g) for x in model.new_state(3)]
    copies = [x.clone() for x in state]
    logits, after = decoder.step(ids, state)
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))
    alone, after_alone = decoder.step(ids[1:2], [x[1:2] for x in state])
    assert close(alone[0], logits[1], 1e-6)
    assert all(close(a[0], b[1], 1e-6) for a, b in zip(after_alone, after, strict=True))
    assert decoder.step(ids[:0], [x[:0] for x in state])[0].shape == (0, 77)


@NO_COMPILER
def test_bytes_are_those_of_the_storage():
    config = ModelConfig(n_layer=2, n_embd=128, vocab_size=1000)
    model = RWKV(config, init_weights(config, seed=0))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n.endswith(".weight"))
    sizes = {storage: Decoder(model, storage).nbytes for storage in ("float32", "bfloat16", "int8")}
    filling = 8 * 128  # the head's 1000 rows become 63 panels of 16
    assert sizes["float32"] == 4 * (config.n_params + filling) and sizes["bfloat16"] < 0.51 * sizes["float32"]
    eight = matrices - 1000 * 128 + filling  # the embedding stays in 16 bits
    assert sizes["bfloat16"] - sizes["int8"] == 2 * eight - eight * (1 + 4 / GROUP)


@NO_COMPILER
def test_what_it_cannot_do_is_said(monkeypatch):
    decoder = Decoder(make_model())
    with pytest.raises(ValueError, match="token ids run from 4 to 77, but this model has vocab_size = 77"):
        decoder.step(torch.tensor([4, 77]), make_model().new_state(2))
    for state in (make_model().new_state(2), make_model().new_state()[:-1], make_model(head_size_a=32).new_state()):
        with pytest.raises(ValueError, match=r"the state must be 6 tensors, the first three of shapes"):
            decoder.step(torch.tensor([4]), state)
    with pytest.raises(ValueError, match="storage = 'int4': choose from float32, bfloat16, int8"):
        Decoder(make_model(), "int4")
    with pytest.raises(ValueError, match="head_size_a = 8 is no multiple of 16"):
        Decoder(make_model(head_size_a=8))
    for options, words in [({"head_qk": 8}, "head_qk = 8"), ({"my_testing": "g"}, "my_testing = 'g'")]:
        with pytest.raises(ValueError, match=f"the model has {words}; call the RWKV itself"):
            Decoder(make_model(**options))
    with pytest.raises(ValueError, match="the model has head_qk = 16; call the RWKV itself"):
        Decoder(make_model(head_qk=16))
    monkeypatch.setattr(build, "find_cxx", lambda: None)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler was found"):
        Decoder(make_model())


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 200)), scale=st.sampled_from([0, 1e-30, 1, 1e9]))
def test_eight_bits_are_off_by_half_a_step_at_most(shape, scale):
    (rows, columns), seed = shape, sum(shape)
    x = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = pack(x, "int8")
    back = packed.unpack()
    assert back.shape == x.shape and packed.numbers.dtype == torch.int8
    for row in range(rows):
        for start in range(0, columns, GROUP):  # as the module says it, number by number
            part, found = x[row, start : start + GROUP], back[row, start : start + GROUP]
            step = float(part.abs().max()) / 127
            assert float((part - found).abs().max()) <= step * 0.5001
            assert float(found.abs().max()) == pytest.approx(127 * step, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (17, 50), (40, 65)])
def test_other_storages_round_as_torch_does(shape):
    x = torch.randn(shape)
    assert torch.equal(pack(x, "bfloat16").unpack(), x.bfloat16().float())
    assert torch.equal(pack(x, "float32").unpack(), x)
    with pytest.raises(ValueError, match="holds infinity or NaN"):
        pack(torch.where(x == x.max(), torch.inf, x), "int8")


def test_memory_in_large_pages_is_memory():
    pages, sizes = Pages(), [(3, 5), (1 << 20, 9), (0, 4), (7,), (1 << 25,)]  # the last ones need blocks of their own
    tensors = [pages.empty(shape, dtype=torch.int8) for shape in sizes] + [pages.empty((3,), dtype=torch.float32)]
    for i, x in enumerate(tensors):
        x.fill_(i)
    del pages
    assert [tuple(x.shape) for x in tensors] == [*sizes, (3,)] and tensors[-1].dtype == torch.float32
    assert all(bool((x == i).all()) for i, x in enumerate(tensors))
    assert all(x.data_ptr() % 64 == 0 for x in tensors if x.numel())


def test_recycled_memory_is_lent_to_one_at_a_time():
    recycled = Recycled()
    first, second = recycled.empty(10), recycled.empty(10)
    view, at = first[3:5].fill_(1), first.data_ptr()
    second.fill_(2)
    del first
    third = recycled.empty(10).fill_(3)  # the view still holds the first one's memory
    assert len({at, second.data_ptr(), third.data_ptr()}) == 3 and view.tolist() == [1, 1]
    del view
    assert recycled.empty(10).data_ptr() == at
    assert recycled.empty(7).shape == (7,) and recycled.empty(0).shape == (0,)
    kept = second.clone()
    del recycled
    assert torch.equal(second, kept)


@NO_COMPILER
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("halves", "out"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("columns", [16, 160])
def test_products_of_any_size(storage, halves, out, columns):
    """Rows that fill no panel, columns that fill no group, and all tiles that the vectors are cut into."""
    g = torch.Generator().manual_seed(columns)
    packed = pack(torch.randn(83, columns, generator=g), storage)
    w = packed.unpack().bfloat16() if halves else packed.unpack()
    for n in (1, 2, 3, 5, 7, 8, 9, 15, 16, 31):
        x = torch.nn.functional.pad(torch.randn(n, columns, generator=g), (0, packed.width - columns))
        x = x.bfloat16() if halves else x
        y = torch.full((n + 1, 83), 7.0, dtype=out)
        product(packed, x, y[:n])
        want = x[:, :columns].double() @ w.double().T
        assert close(y[:n], want, 2e-6 if out == torch.float32 else 2**-8) and bool((y[n] == 7).all()), n
        if out == torch.bfloat16:  # the sums, rounded once, ties to even
            sums = torch.empty(n, 83)
            product(packed, x, sums)
            assert torch.equal(y[:n], sums.bfloat16()), n


@NO_COMPILER
def test_a_sum_does_not_depend_on_its_company():
    x = torch.randn(30, 128)
    for storage in ("float32", "bfloat16"):  # 8 bits: many vectors take numbers that were rounded with their scale
        packed, together, alone = pack(torch.randn(70, 128), storage), torch.empty(30, 70), torch.empty(30, 70)
        product(packed, x, together)
        for n in range(30):
            product(packed, x[n : n + 1], alone[n : n + 1])
        assert torch.equal(together, alone)
