"""Strategies: the same places and the same bytes as the `rwkv` package, and an error that points at the mistake."""

import contextlib
import inspect
import io
import itertools
import os
import re
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rwkv_nb.inference.engine import ours_can
from rwkv_nb.inference.memory import OURS, Device, best_strategy, memory_plan
from rwkv_nb.inference.strategy import FORMATS, StrategyError, parse_strategy
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights

CONFIG = ModelConfig(n_layer=4, n_embd=64, vocab_size=100, dim_ffn=224)
EAGLE = ModelConfig(n_layer=32, n_embd=4096, vocab_size=65536)
GIB = 2**30


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """strategy -> the package's own model of CONFIG, loaded with it."""
    os.environ.setdefault("RWKV_JIT_ON", "0")
    model = pytest.importorskip("rwkv.model")
    path = tmp_path_factory.mktemp("strategy") / "tiny.pth"
    torch.save({name: x.bfloat16() for name, x in init_weights(CONFIG, seed=0).items()}, path)

    def load(strategy):
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(model.gc, "collect"):  # seconds, each time
            return model.RWKV(str(path), strategy, verbose=False)

    return load


ENTRY = st.tuples(st.sampled_from(sorted(FORMATS)), st.sampled_from(["", "i8", "i4"]), st.none() | st.integers(1, 7),
                  st.booleans())  # fmt: skip


def written(entries):
    counts = ("" if n is None else f" *{n}{'+' if plus else ''}" for _, _, n, plus in entries)
    return " -> ".join(f"cpu {f}{bits}{count}" for (f, bits, *_), count in zip(entries, counts, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(ENTRY, min_size=1, max_size=4))
@example(entries=[("fp16", "i8", 2, True), ("fp32", "", None, False)])
@example(entries=[("fp32", "", 1, False), ("bf16", "i8", None, False), ("fp16", "", None, False)])
@example(entries=[("fp32", "", None, False), ("bf16", "", None, False), ("fp16", "", None, False)])
def test_places_and_bytes_are_the_packages(package, entries):
    text = written(entries)
    theirs = package(text)
    plan = parse_strategy(text, CONFIG.n_layer)
    for place, other in zip(plan.places, theirs.strategy, strict=True):
        dtype = getattr(torch, place.dtype)
        assert (place.device, dtype, place.streamed) == (other.device, other.atype, other.stream), text
        assert place.eight_bit == (other.wtype == torch.uint8), text
    allocated = sum(x.nbytes for x in theirs.w.values())
    assert memory_plan(plan, CONFIG).weights == {"cpu": allocated}, text


def test_the_state_is_the_packages(package):
    for text in ("cpu fp32", "cpu bf16", "cpu fp16 *2 -> cpu fp32"):
        _, state = package(text).forward([1, 2, 3], None)
        mine = memory_plan(parse_strategy(text, CONFIG.n_layer), CONFIG)
        assert sum(x.nbytes for x in state) == mine.state["cpu"]


def test_the_example_of_the_packages_page():
    plan = parse_strategy("cuda fp16i8 *10 -> cuda:1 fp16 *8 -> cpu fp32", 32)
    assert [p.device for p in plan.places] == ["cuda"] * 10 + ["cuda:1"] * 8 + ["cpu"] * 15
    assert [p.dtype for p in plan.places] == ["float16"] * 18 + ["float32"] * 15
    assert [p.eight_bit for p in plan.places] == [True] * 10 + [False] * 23
    assert plan.devices == ("cuda", "cuda:1", "cpu") and plan.notes == ()
    assert parse_strategy(" cpu   fp32 ", 3).text == "cpu fp32"


def test_streaming_keeps_what_is_named_and_streams_what_is_left():
    plan = parse_strategy("cuda fp16 *10+ -> cpu fp32 *8", 32)
    assert [p.device for p in plan.places] == ["cuda"] * 25 + ["cpu"] * 8
    assert [p.streamed for p in plan.places] == [False] * 10 + [True] * 15 + [False] * 8
    needed = memory_plan(plan, EAGLE)
    D, F = 4096, 14336
    large = 4 * D * D + 2 * D * F + D * D  # r, k, v, output; key, value, receptance of the channel mixing
    assert needed.streamed == {"cuda": 15 * 2 * large}
    everything = memory_plan(parse_strategy("cuda fp16", 32), EAGLE)
    assert needed.weights["cuda"] < everything.weights["cuda"] * 10.5 / 33 + 24 * 2 * D * D


def test_what_is_left_over_is_said():
    assert "gets 5 places" in parse_strategy("cpu fp32 *9 -> cpu bf16", 4).notes[0]
    assert "nothing is left for cpu bf16" in parse_strategy("cpu fp32 *9 -> cpu bf16", 4).notes[1]
    assert "takes 3 more" in parse_strategy("cpu fp32 *1 -> cpu bf16 *1", 4).notes[0]
    assert "changes nothing" in parse_strategy("cpu fp16i4", 4).notes[0]


# The package's own test of a text, as of 0.8.25 to 0.8.32 (it is a local variable there).
PACKAGES_REGEX = (
    r"^(?:(?:^|->) *(?:cuda(?::[\d]+)?|cpu|mps|dml) (?:fp(?:16|32)|bf16)(?:i8|i4|i3)?(?: \*[\d]+\+?)? *)+$"
)
WORDS = st.sampled_from(["cuda", "cuda:1", "cuda:", "cpu", "mps", "dml", "gpu", "fp16", "fp32", "bf16", "bf32",
                         "fp16i8", "bf16i3", "fp16i5", "*1", "*10+", "*+", "*", "10", "->", "->", " ->", "-> ", ">"])


def test_the_regex_is_the_packages():
    source = inspect.getsource(pytest.importorskip("rwkv.model"))
    assert f'r"{PACKAGES_REGEX}"' in source


@settings(max_examples=500, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8).map(" ".join))
@example("cuda fp16i8 *10 -> cuda:1 fp16 *8 -> cpu fp32")
@example("cpu fp32->cpu bf16 *1+")
@example("cuda bf16i3 -> cpu fp16i4 *2+")
@example("cpu fp32 -> -> cpu fp32")
@example("-> cuda fp16")
def test_what_the_package_reads_we_read_and_nothing_else(text):
    try:
        parse_strategy(text, 12)
    except StrategyError:
        ours = False
    else:
        ours = True
    single = re.sub(" +", " ", text).strip()  # we forgive spaces
    read = bool(re.match(PACKAGES_REGEX, single))
    if single.startswith("->"):  # its regex lets this through, and then the entry before the arrow has no device
        read = False
    assert ours == read, text


def test_what_users_report_about_a_device_is_said():
    for device in ("mps", "dml"):
        [note] = parse_strategy(f"{device} fp16 *3 -> {device} fp32", 12).notes
        assert note.startswith(f"{device}: users report wrong text") and "cpu fp32" in note


def test_an_error_carries_its_place():
    with pytest.raises(StrategyError) as error:
        parse_strategy("cpu fp32 *2 ->\tgpu fp16", 12)
    e = error.value
    assert e.text[e.at : e.at + e.length] == "gpu" and e.reason.startswith("'gpu' is no device")
    *_, line, marker = str(e).splitlines()
    assert line[marker.index("^") : marker.rindex("^") + 1] == "gpu" and "\t" not in line
    with pytest.raises(ValueError, match="strategy None: expected a text"):
        parse_strategy(None, 12)


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        ("", 0, "an entry is empty"),
        ("gpu fp16", 0, "'gpu' is no device"),
        ("cuda", 4, "a format is missing after cuda"),
        ("cuda: fp16", 0, "no device"),
        ("cpu fp64", 4, "'fp64' is no format"),
        ("cpu fp32 -> ", 11, "an entry is empty"),
        ("cpu fp32 10", 9, "expected a count"),
        ("cpu fp32 *x", 9, "expected a count"),
        ("cuda fp16 *0", 10, "nothing to do"),
        ("cuda fp16 *3 -> cpu fp32 cuda", 25, "expected a count"),
        ("cuda fp16 *3 *4", 13, "one word too many"),
        ("cuda fp16 > cpu fp32", 10, "expected a count"),
    ],
)
def test_an_error_points_at_the_mistake(text, at, words):
    with pytest.raises(StrategyError, match=words) as error:
        parse_strategy(text, 12)
    *_, marker = str(error.value).splitlines()
    assert marker.index("^") == 4 + at and f"character {at + 1}" in marker


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="cudapfi1683*+-> :x", max_size=30))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(StrategyError):
        plan = parse_strategy(text, 5)
        assert len(plan.places) == 6 and parse_strategy(plan.text, 5).places == plan.places


def test_eagle_7b():
    """15.0 GB in 16 bits, its embedding in the computer's memory; 8 bits halve the matrices; the state is 34.6 MB."""
    sizes = {text: memory_plan(parse_strategy(text, 32), EAGLE) for text in ("cuda fp16", "cuda fp16i8", "cpu fp32")}
    embedding = 65536 * 4096 * 2
    half = sizes["cuda fp16"]
    in_float32 = 32 * (2 * 4096 + 2 * 4096)  # decay, bonus, group norm
    assert half.weights["cuda"] + embedding == 2 * (EAGLE.n_params - 2 * 4096) + 2 * in_float32
    assert half.weights["cpu"] == embedding
    assert 0.5 < sizes["cuda fp16i8"].weights["cuda"] / half.weights["cuda"] < 0.502
    assert half.state == {"cuda": 32 * (2 * 4096 * 2 + 4 * 64 * 64 * 64)}
    assert sizes["cpu fp32"].weights["cpu"] == 4 * (EAGLE.n_params - 2 * 4096)


def test_bytes_of_each_layer():
    """Blocks of one format weigh the same, the head is V x D, and together they are all weights but the embedding."""
    needed = memory_plan(parse_strategy("cuda fp16i8 *10 -> cuda:1 bf16 *8 -> cpu fp32", 32), EAGLE)
    D, F, V = 4096, 14336, 65536
    vectors = 10 * D  # two layer norms, and six mixes, in the format of the block; decay, bonus, ln_x in float32
    matrices = 6 * D * D + 2 * D * F
    assert needed.layers[10] == 2 * (matrices + vectors) + 4 * 4 * D
    assert needed.layers[-1] == 4 * (V * D + 2 * D) and needed.embedding == 2 * V * D
    assert len(needed.layers) == 33 and len(set(needed.layers)) == 4
    assert sum(needed.layers) + needed.embedding == sum(needed.weights.values())


def test_cuda_and_cuda_0_are_one_device():
    card = {"cpu": Device(64 * GIB, 40e9), "cuda": Device(10 * GIB, 900e9)}
    both = memory_plan(parse_strategy("cuda:0 fp16 *16 -> cuda fp16", 32), EAGLE)
    alone = memory_plan(parse_strategy("cuda fp16", 32), EAGLE)
    assert both.weights["cuda:0"] == alone.weights["cuda"] and both.state["cuda:0"] == alone.state["cuda"]
    assert "cuda" not in both.weights and both.lacking(card)["cuda:0"] == alone.lacking(card)["cuda"]
    assert both.seconds_per_token(card) == alone.seconds_per_token(card)
    assert alone.tokens_per_second({**card, "cuda:0": card.pop("cuda")}) == 1 / both.seconds_per_token(
        {"cpu": card["cpu"], "cuda": Device(10 * GIB, 900e9)}
    )


def test_two_cards_share_what_one_cannot_hold():
    sizes = {"cuda:0": 8, "cuda:1": 12}
    machine = {"cpu": Device(64 * GIB, 40e9)} | {card: Device(n * GIB, 900e9) for card, n in sizes.items()}
    found = best_strategy(EAGLE, machine)
    assert found.plan.devices == ("cuda:0", "cuda:1") and not found.lacking(machine)
    n = found.plan.entries[0].count
    more = found.plan.text.replace(f"*{n}", f"*{n + 1}")
    assert set(memory_plan(parse_strategy(more, 32), EAGLE).lacking(machine)) == {"cuda:0"}
    smaller = {**machine, "cuda:1": Device(2 * GIB, 900e9)}
    found = best_strategy(EAGLE, smaller)
    assert found.plan.devices == ("cuda:0", "cuda:1", "cpu") or found.plan.text.startswith("cuda:0 fp16i8")
    assert not found.lacking(smaller)


def test_the_best_strategy_that_an_engine_can():
    machine = {"cpu": Device(32 * GIB, 40e9), "cuda": Device(8 * GIB, 900e9)}
    assert not ours_can(best_strategy(EAGLE, machine).plan)
    assert best_strategy(EAGLE, machine, OURS, ours_can).plan.text == "cpu fp32i8"


def test_our_decoder_reads_8_bits_as_they_are():
    machine = {"cpu": Device(64 * GIB, 40e9)}
    plan = parse_strategy("cpu fp32i8", 32)
    ours, theirs = memory_plan(plan, EAGLE, OURS), memory_plan(plan, EAGLE)
    assert ours.weights == theirs.weights and ours.tokens_per_second(machine) > 30 * theirs.tokens_per_second(machine)
    assert best_strategy(EAGLE, machine, OURS).plan.text == "cpu fp32i8"
    assert best_strategy(EAGLE, machine).plan.text == "cpu bf16"


def test_the_bandwidth_limit():
    machine = {"cpu": Device(64 * GIB, 40e9), "cuda": Device(24 * GIB, 900e9, bus=10e9)}
    alone = memory_plan(parse_strategy("cpu fp32", 32), EAGLE)
    read = 4 * (EAGLE.n_params - 2 * 4096 - 65535 * 4096)
    assert alone.seconds_per_token(machine) == pytest.approx(read / 40e9)
    streamed = memory_plan(parse_strategy("cuda fp16 *0+", 32), EAGLE)
    assert streamed.seconds_per_token(machine) > streamed.streamed["cuda"] / 10e9
    with pytest.raises(KeyError, match="cuda:1: not among the devices cpu, cuda"):
        memory_plan(parse_strategy("cuda:1 fp16", 32), EAGLE).seconds_per_token(machine)
    with pytest.raises(ValueError, match="planned for 12 layers, the model has 32"):
        memory_plan(parse_strategy("cpu fp32", 12), EAGLE)


def test_fits_or_what_is_lacking():
    plan = memory_plan(parse_strategy("cuda fp16", 32), EAGLE)
    assert plan.lacking({"cpu": Device(32 * GIB, 4e10), "cuda": Device(24 * GIB, 9e11)}) == {}
    short = plan.lacking({"cpu": Device(32 * GIB, 4e10), "cuda": Device(8 * GIB, 9e11)})
    assert short == {"cuda": plan.total("cuda") - 0.9 * 8 * GIB}
    assert set(plan.lacking({"cpu": Device(32 * GIB, 4e10)})) == {"cuda"}


@pytest.mark.parametrize(
    ("cpu", "cuda", "best"),
    [
        (64, 80, "cuda bf16"),
        (64, 24, "cuda bf16"),
        (64, 10, "cuda fp16i8"),
        (32, None, "cpu bf16"),
        (12, None, "cpu fp32i8"),
        (4, None, None),
    ],
)
def test_the_best_strategy_of_a_machine(cpu, cuda, best):
    machine = {"cpu": Device(cpu * GIB, 40e9)} | ({"cuda": Device(cuda * GIB, 900e9)} if cuda else {})
    found = best_strategy(EAGLE, machine)
    assert (found.plan.text if found else None) == best
    assert not found or not found.lacking(machine)


def test_a_small_card_takes_as_many_layers_as_fit():
    machine = {"cpu": Device(64 * GIB, 40e9), "cuda": Device(4 * GIB, 900e9)}
    found = best_strategy(EAGLE, machine)
    entry = found.plan.entries[0]
    assert entry.device == "cuda" and not found.lacking(machine)
    more = found.plan.text.replace(f"*{entry.count}", f"*{entry.count + 1}")
    assert more != found.plan.text
    assert memory_plan(parse_strategy(more, 32), EAGLE).lacking(machine), "one more layer would have fitted"


def test_no_other_split_that_fits_is_quicker():
    machine = {"cpu": Device(GIB, 40e9), "cuda": Device(GIB / 4, 900e9)}
    config = ModelConfig(n_layer=12, n_embd=768, vocab_size=65536)
    found = best_strategy(config, machine)
    for format in ("fp32", "bf16", "fp16", "fp16i8"):
        for n, rest in itertools.product(range(1, 13), (" -> cpu fp32", " -> cpu bf16", "+")):
            text = f"cuda {format} *{n}{rest}"
            other = memory_plan(parse_strategy(text, 12), config)
            if not other.lacking(machine):
                assert other.seconds_per_token(machine) >= found.seconds_per_token(machine), text
