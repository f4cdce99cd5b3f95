"""Counts, panel and pictures of notebook 06 against the model itself, against torch, and against published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.teaching import model_pictures, plots
from rwkv_nb.teaching import model_sizes as sizes
from rwkv_nb.teaching.widgets import model as widget

PNG = b"\x89PNG"
SMALL = ModelConfig(2, 64, 50, head_size_a=16, dim_att=96, dim_ffn=160)


@pytest.fixture(scope="module")
def model():
    return RWKV(SMALL)


def test_parameters_of_the_parts_are_those_of_the_modules(model):
    found = {part.name: part.parameters for part in sizes.parts(SMALL)}
    assert found["time mixing"] == sum(w.numel() for block in model.blocks for w in block.att.parameters())
    assert found["channel mixing"] == sum(w.numel() for block in model.blocks for w in block.ffn.parameters())
    assert found["embedding"] == found["head"] == 50 * 64
    assert sum(found.values()) == sum(w.numel() for w in model.parameters())


def test_operations_are_two_for_each_number_of_a_linear_layer_and_four_for_each_of_the_memory(model):
    found = {part.name: part.operations for part in sizes.parts(SMALL)}
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    x = [torch.randn(1, layer.in_features) for layer in linear]
    with FlopCounterMode(display=False) as counter:
        for layer, row in zip(linear, x, strict=True):
            layer(row)
    assert sum(found.values()) - found["WKV-5"] == counter.get_total_flops()
    assert found["WKV-5"] == 4 * sum(state.numel() for state in model.new_state(1)[1::3])


def test_state_numbers_are_those_of_the_state(model):
    assert sizes.state_numbers(SMALL) == sum(x.numel() for x in model.new_state(1))
    assert sizes.state_numbers(sizes.official("7B")) == 8_650_752


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("0.1B", 192_807_936), ("0.4B", 461_721_600), ("1.5B", 1_577_754_624), ("3B", 3_062_999_040),
     ("7B", 7_518_044_160)],
)  # fmt: skip
def test_official_sizes(name, parameters):
    assert widget.rows(sizes.official(name))[-1][2] == parameters


def test_rows_name_the_matrices_of_one_layer():
    found = {name: shapes for name, shapes, _, _ in widget.rows(SMALL)}
    assert found["time mixing"] == "4 × (96, 64), (64, 96)"
    assert found["channel mixing"] == "(160, 64), (64, 64), (64, 160)"
    assert found["WKV-5"] == "state 6 × (16, 16)" and found["head"] == "(50, 64)"


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (12_345_678, "12.3 MB"),
     (192_807_936, "193 MB"), (15_036_088_320, "15.0 GB"), (2e12, "2.00 TB")],
)  # fmt: skip
def test_short(number, text):
    assert widget.short(number, "B") == text


def test_summary_of_the_7b_model():
    amounts = list(widget.summary(sizes.official("7B")).values())
    assert amounts[:3] == ["15.0 GB", "120 GB", "34.6 MB"]


def test_panel_follows_its_controls():
    panel = widget.panel("0.1B")
    assert "192,807,936" in panel.table.value and bytes(panel.picture.value).startswith(PNG)
    before = bytes(panel.picture.value)
    panel.size.value = "7B"
    assert (panel.layers.value, panel.width.value) == (32, 4096) and "7,518,044,160" in panel.table.value
    assert bytes(panel.picture.value) != before
    panel.vocabulary.value = 96
    assert panel.size.value == widget.OWN and "7,518,044,160" not in panel.table.value
    panel.size.value = "0.4B"
    assert panel.vocabulary.value == 65536 and panel.size.value == "0.4B" and "461,721,600" in panel.table.value
    panel.layers.value, panel.width.value = 32, 2560
    assert panel.size.value == "3B"


def test_panel_shows_what_is_wrong_and_recovers():
    panel = widget.panel()
    panel.width.value = 100
    assert "multiple of 32" in panel.error.value and panel.table.value == "" and not panel.picture.value
    panel.width.value = 128
    assert panel.error.value == "" and bytes(panel.picture.value).startswith(PNG)


def test_panel_has_a_text_form_and_named_controls():
    panel = widget.panel()
    assert "needs a running kernel" in repr(panel)
    for control in (panel.size, panel.layers, panel.width, panel.vocabulary):
        assert control.description


def test_the_diagram_names_every_part_of_a_block():
    fig = model_pictures.model_figure()
    texts = " ".join(text.get_text() for ax in fig.axes for text in ax.texts)
    for name in ("emb", "ln0", "ln1", "ln2", "ln_out", "head", "ln_x", "WKV-5", "W_g", "W_o", "(B, H, N, N)", "T, F)"):
        assert name in texts, name
    assert plots.png(fig).startswith(PNG)


def test_shares_fill_the_bar():
    fig = model_pictures.shares_figure({"a": SMALL, "b": sizes.official("3B")})
    for ax in fig.axes[:2]:
        for row in range(2):
            bars = [bar for bar in ax.patches if bar.get_y() < row < bar.get_y() + bar.get_height()]
            assert sum(bar.get_width() for bar in bars) == pytest.approx(100)
            assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(100)  # side by side


def test_heat_maps_show_what_they_were_given():
    values = np.arange(12.0).reshape(3, 4)
    fig = model_pictures.layers_figure([("a", values)], "share")
    assert np.array_equal(fig.axes[0].images[0].get_array(), values)
    weights = np.stack([np.eye(3), -np.eye(3)])
    fig = model_pictures.heads_figure(weights, ["one", "two"], "a b")
    assert np.array_equal(fig.axes[1].images[0].get_array(), weights[1])
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["a", "␣", "b"]
    fig = model_pictures.states_figure(weights, ["one", "two"])
    assert fig.axes[0].images[0].get_clim() == (-1, 1)
