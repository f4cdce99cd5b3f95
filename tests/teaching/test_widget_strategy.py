"""The strategy planner of notebook 09, its picture, and how it shows a mistake."""

from __future__ import annotations

import html
import re

import pytest

from rwkv_nb.inference import report
from rwkv_nb.inference.memory import OURS, Device, memory_plan
from rwkv_nb.inference.strategy import StrategyError, parse_strategy
from rwkv_nb.teaching import plots
from rwkv_nb.teaching.model_sizes import official
from rwkv_nb.teaching.widgets import strategy as draw

PNG = b"\x89PNG"
CARD = draw.MACHINES["RTX 4060"]


def plain(text):
    return html.unescape(re.sub("<[^>]*>", "|", text))


def test_bars_are_the_bytes_of_the_plan():
    needed = draw.plan_of("cuda fp16i8 *3+ -> cpu fp32 *1", "7B", CARD)
    bars = draw.bars(needed)
    assert {name: row[0] + row[1] for name, row in bars.items()} == needed.weights
    assert bars["cpu"][1] == needed.streamed["cuda"] > 0 == bars["cuda"][1]
    assert bars["cuda"][2] == needed.state["cuda"]
    widths = {}
    for bar in draw.figure(needed, CARD).axes[1].patches:
        widths.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar.get_width())
    assert sum(widths[0]) == pytest.approx(needed.total(list(needed.weights)[0]) / 1e9)
    assert sum(widths[1]) == pytest.approx(needed.total(list(needed.weights)[1]) / 1e9)


def test_the_picture_says_what_fits():
    def words(text, machine=CARD):
        return [t.get_text().strip() for t in draw.figure(draw.plan_of(text, "7B", machine), machine).axes[1].texts]

    assert words("cuda fp16") == ["fits", "does not fit"] and words("cuda fp16i8 *20 -> cpu bf16") == ["fits", "fits"]
    assert words("cpu bf16") == ["fits", "unused"]
    assert words("cuda:1 fp16") == ["fits", "not in this machine", "unused"]


def test_our_decoder_counts_8_bits_as_they_are():
    plan = parse_strategy("cpu fp32i8", 32)
    assert draw.plan_of("cpu fp32i8", "7B", CARD) == memory_plan(plan, official("7B"), OURS)
    assert draw.plan_of("cpu fp32i8", "7B", CARD, ours=False) == memory_plan(plan, official("7B"))
    split = "cpu fp32i8 *2 -> cpu fp32"  # the package's work, whatever is ticked
    assert draw.plan_of(split, "7B", CARD) == draw.plan_of(split, "7B", CARD, ours=False)
    with pytest.raises(ValueError, match="nothing fits: the 7B model"):
        draw.plan_of("auto", "7B", {"cpu": Device(1e9, 1e9)})


def test_a_mistake_is_marked():
    with pytest.raises(StrategyError) as error:
        parse_strategy("cpu fp32 -> <b> fp16", 32)
    shown = draw.marked(error.value)
    assert "<u>&lt;b&gt;</u></mark> fp16</pre>" in shown and "'&lt;b&gt;' is no device" in shown.replace("&#x27;", "'")
    with pytest.raises(StrategyError) as error:
        parse_strategy("cuda", 32)
    assert "<pre>cuda<mark" in draw.marked(error.value) and "<u>␣</u>" in draw.marked(error.value)


def test_panel_follows_its_controls():
    panel = draw.panel()
    assert "fits, with 10% to spare; at most 70 tokens a second" in panel.verdict.value
    assert panel.memory["cuda"].value == 24 and panel.bandwidth["cuda"].value == 1008 and panel.bus.value == 25
    picture = bytes(panel.picture.value)
    assert picture.startswith(PNG)
    panel.memory["cuda"].value = 8
    assert "does NOT fit" in panel.verdict.value and bytes(panel.picture.value) != picture
    assert panel.preset.value == draw.OWN
    before = bytes(panel.picture.value)
    panel.strategy.value = "cuda fp17"
    assert "character 6" in panel.verdict.value and "<u>fp17</u>" in panel.verdict.value
    assert bytes(panel.picture.value) == before and panel.error.value == "" and panel.report.value == ""
    panel.strategy.value = "cuda fp16i8 *20 -> cpu fp32"
    here = {"cpu": Device(64e9, 60e9, 25e9), "cuda": Device(8e9, 1008e9, 25e9)}
    needed = draw.plan_of(panel.strategy.value, "7B", here)
    assert report.verdict(needed, here) in plain(panel.verdict.value)
    for row in report.place_rows(needed) + report.device_rows(needed, here):
        assert "||".join(row) in plain(panel.report.value)
    panel.size.value = "0.1B"
    assert "gets 13 places" in panel.verdict.value, "the note of a count that is too large"


def test_presets_fill_the_boxes_and_the_button_finds_the_best(monkeypatch):
    panel = draw.panel()
    panel.preset.value = "two RTX 3060"
    assert panel.preset.value == "two RTX 3060" and panel.memory["cuda:1"].value == 12
    assert "does NOT fit" in panel.verdict.value
    panel.best.click()
    assert panel.strategy.value.startswith("cuda bf16 *") and "cuda:1 bf16" in panel.strategy.value
    assert "fits, with 10% to spare" in panel.verdict.value and panel.preset.value == "two RTX 3060"
    panel.preset.value = "laptop"
    assert panel.memory["cuda"].value == 0 and "no cuda, cuda:1" in panel.verdict.value
    panel.best.click()
    assert panel.strategy.value == "cpu fp32i8"
    speed = panel.verdict.value
    panel.ours.value = False
    assert panel.verdict.value != speed and panel.preset.value == "laptop"
    panel.memory["cpu"].value = 2
    panel.best.click()
    assert "nothing fits: the 7B model" in panel.error.value, "an exception of a callback is shown"
    monkeypatch.setattr(draw, "this_machine", lambda: {"cpu": Device(7.54e9, 3.21e10)})
    panel.preset.value = draw.HERE
    assert (panel.memory["cpu"].value, panel.bandwidth["cpu"].value, panel.error.value) == (7.5, 32.1, "")


def test_every_control_has_a_name_and_the_page_works_without_a_kernel():
    panel = draw.panel()
    controls = [panel.strategy, panel.size, panel.preset, panel.best, panel.bus, panel.ours]
    for control in [*controls, *panel.memory.values(), *panel.bandwidth.values()]:
        assert control.description
    assert "needs a running kernel" in repr(panel)


@pytest.mark.parametrize("name", draw.MACHINES)
def test_figures_draw_for_every_machine(name):
    machine = draw.MACHINES[name]
    assert plots.png(draw.figure(draw.plan_of("auto", "7B", machine), machine)).startswith(PNG)
