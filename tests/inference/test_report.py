"""A plan in words."""

from rwkv_nb.inference import report
from rwkv_nb.inference.memory import Device, memory_plan
from rwkv_nb.inference.strategy import parse_strategy
from rwkv_nb.model.config import ModelConfig

EAGLE = ModelConfig(n_layer=32, n_embd=4096, vocab_size=65536)
MACHINE = {"cpu": Device(32e9, 40e9), "cuda": Device(12e9, 900e9, bus=10e9)}


def planned(text):
    return memory_plan(parse_strategy(text, 32), EAGLE)


def test_sizes_have_three_digits():
    shown = [report.size(n) for n in (15_036_088_320, 999_950_000, 1, 123_456, 9_994_000, 99_960_000_000)]
    assert shown == ["15.0 GB", "1.00 GB", "1 B", "123 kB", "9.99 MB", "100 GB"]


def test_neighbours_of_one_kind_share_a_row():
    rows = report.place_rows(planned("cuda fp16i8 *10 -> cuda fp16 *1 -> cpu fp32"))
    assert [row[:3] for row in rows] == [
        ("embedding", "cpu", "float16"), ("0 to 9", "cuda", "float16 in 8 bits"), ("10", "cuda", "float16"),
        ("11 to 31", "cpu", "float32"), ("head", "cpu", "float32"),
    ]  # fmt: skip
    needed = planned("cuda fp16 *30+")
    assert [row[2] for row in report.place_rows(needed)][1:] == ["float16", "float16, streamed", "float16, streamed"]
    assert report.place_rows(needed)[1][3:] == (report.size(needed.layers[0]), report.size(30 * needed.layers[0]))


def test_devices_and_verdict():
    needed = planned("cuda fp16 *20 -> cpu fp32")
    cpu, cuda = sorted(report.device_rows(needed, MACHINE))
    assert cpu[0] == "cpu" and cpu[-2:] == ("32.0 GB", "fits") and cuda[-2:] == ("12.0 GB", "fits")
    assert report.verdict(needed, MACHINE).startswith("fits, with 10% to spare; at most ")
    large = planned("cuda fp16")
    assert dict((row[0], row[-1]) for row in report.device_rows(large, MACHINE))["cuda"] == "lacks 3.73 GB"
    assert "does NOT fit with 10% to spare (cuda)" in report.verdict(large, MACHINE)
    assert report.verdict(planned("cuda:1 fp16"), MACHINE) == "does NOT fit: this machine has no cuda:1"
    assert report.device_rows(planned("cuda:1 fp16"), MACHINE)[1][-2:] == ("none", f"lacks {14.5:.1f} GB")


def test_the_text_has_both_tables_the_notes_and_the_verdict():
    text = report.text(planned("mps fp16 *40 -> cpu fp32"), MACHINE)
    assert "layers " in text and "embedding" in text and "note: mps: users report" in text
    assert text.splitlines()[-1] == "does NOT fit: this machine has no mps"
    assert "verdict" not in report.text(planned("cpu fp32"))
