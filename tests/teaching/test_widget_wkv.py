"""The state panel of notebook 04 and its pictures: what a memory made by hand must hold, and what the panel says."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest
import torch

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.teaching import plots, wkv_pictures
from rwkv_nb.teaching.widgets import wkv as draw
from rwkv_nb.wkv import wkv5_reference

PNG = b"\x89PNG"
LINE = "the rat ate the tart"


@pytest.fixture(scope="module")
def small_model():
    tokenizer = CharTokenizer(sorted(set(LINE)))
    config = ModelConfig(n_layer=2, n_embd=32, vocab_size=len(tokenizer), head_size_a=16)
    weights = init_weights(config, seed=0)
    for name, weight in weights.items():
        if name.endswith("att.output.weight"):
            weights[name] = torch.nn.init.orthogonal_(weight)  # zeros at first: then layer 1 would not see layer 0
    return RWKV(config, weights), tokenizer


def test_pair_table_counts_what_came_after_what():
    trace = draw.pair_table(LINE)
    for t in (0, 1, 7, len(LINE) - 1):
        counts = collections.Counter(zip(LINE[:t], LINE[1 : t + 1], strict=True))
        table = {(a, b): trace.states[t][j, i] for j, a in enumerate(trace.rows) for i, b in enumerate(trace.columns)}
        assert table == {pair: counts[pair] for pair in table}


def test_pair_table_is_the_operator_on_one_hot_vectors():
    trace = draw.pair_table(LINE, half_life=5)
    letters = sorted(set(LINE))
    x = torch.eye(len(letters), dtype=torch.float64)[[letters.index(c) for c in LINE]]
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    w = torch.full((1, len(letters)), math.log(math.log(2) / 5), dtype=torch.float64)
    for t in (1, 9, len(LINE)):
        part = [y[None, :t, None] for y in (x, before, x)]
        _, state = wkv5_reference(*part, w, torch.zeros_like(w))
        assert np.allclose(trace.states[t - 1], state[0, 0].numpy())


def test_guess_is_the_most_frequent_follower():
    trace = draw.pair_table("abacab")
    assert [trace.guess(t) for t in range(6)] == [None, None, "b", None, "b", "a"]


@pytest.mark.parametrize("text", ["", "x" * 401])
def test_texts_that_are_too_short_or_too_long_are_refused(text):
    with pytest.raises(ValueError, match=f"has {len(text)} letters"):
        draw.pair_table(text)


def test_model_trace_holds_the_states_of_the_whole_text_at_once(small_model):
    model, tokenizer = small_model
    trace = draw.model_trace(model, tokenizer, LINE, layer=1, head=1)
    with torch.no_grad():
        logits, state = model(torch.tensor([tokenizer.encode(LINE)]))
    order = model.blocks[1].att.time_decay[1].argsort()
    assert np.allclose(trace.states[-1], state[4][0, 1][order].numpy(), atol=1e-5)
    assert np.allclose(trace.guesses, torch.softmax(logits[0], dim=1).numpy(), atol=1e-5)
    assert trace.signed and np.allclose(np.abs(trace.scaled()).max(axis=(0, 2)), 1)


def test_panel_follows_its_controls():
    panel = draw.panel(LINE)
    assert panel.position.value == 8 and bytes(panel.picture.value).startswith(PNG)
    assert "the rat<mark><b><u> </u></b></mark>ate the tart" in panel.story.value
    assert "guess: “r”, next comes “a”" in panel.story.value
    before = bytes(panel.picture.value)
    panel.position.value = 14
    assert bytes(panel.picture.value) != before
    assert "guess: “e”, right" in panel.story.value  # after h
    before = bytes(panel.picture.value)
    panel.half_life.value = 3
    assert bytes(panel.picture.value) != before
    panel.position.value = len(LINE)
    assert "the text ends here" in panel.story.value
    assert panel.error.value == ""


def test_panel_takes_any_text_and_recovers_from_a_bad_one():
    panel = draw.panel(LINE)
    panel.position.value = len(LINE)
    panel.text.value = "<b>&"
    assert panel.position.max == 4 and panel.position.value == 4
    assert "&lt;b&gt;" in panel.story.value and "<b>&" not in panel.story.value
    panel.text.value = ""
    assert "has 0 letters" in panel.error.value
    panel.position.value = 2  # nothing to draw: the message must stay
    assert "has 0 letters" in panel.error.value
    panel.text.value = "a"
    assert panel.error.value == "" and panel.position.max == 1
    panel.text.value = "abab"
    assert panel.error.value == "" and panel.position.max == panel.position.value == 4
    panel.position.value = 1
    assert "nothing is known yet" in panel.story.value


def test_panel_of_a_model_has_no_half_life(small_model):
    model, tokenizer = small_model
    panel = draw.panel(LINE, half_life=None, trace=lambda text, _: draw.model_trace(model, tokenizer, text))
    assert panel.half_life is None and bytes(panel.picture.value).startswith(PNG)
    panel.text.value = "the dog"
    assert "&#x27;d&#x27;" in panel.error.value  # the tokenizer's own message: a letter that it does not know


def test_panel_has_a_text_form_and_named_controls():
    panel = draw.panel(LINE)
    assert "needs a running kernel" in repr(panel)
    assert repr(panel).endswith("; the cell below says the same without one]")
    assert repr(draw.panel(LINE, still="a still picture follows")).endswith("kernel; a still picture follows]")
    for control in (panel.text, panel.position, panel.half_life):
        assert control.description


def test_frames_and_course_show_the_states_they_name():
    trace = draw.pair_table(LINE)
    frames = draw.frames_figure(trace, [3, 19])
    assert np.array_equal(frames.axes[1].images[0].get_array(), trace.states[19])
    assert frames.axes[0].get_title(loc="right") == "the␣" and frames.axes[1].get_title(loc="right").endswith("tart")
    course = draw.course_figure(trace, channel=2)
    assert np.array_equal(course.axes[0].images[0].get_array(), trace.states[:, :, 2].T)


def test_state_figure_frames_the_row_that_is_read():
    trace = draw.pair_table(LINE)
    fig = draw.state_figure(trace, 5)  # "the ra": a is row 1
    frame = fig.axes[0].patches[0]
    assert (frame.get_y(), frame.get_height()) == (0.5, 1)
    assert [bar.get_width() for bar in fig.axes[1].patches] == trace.states[5][1].tolist()


def test_chunks_figure_marks_every_pair_once():
    image = wkv_pictures.chunks_figure(16, 4).axes[0].images[0].get_array()
    assert [(image == kind).sum() for kind in (0, 1, 2)] == [120, 96, 40]  # future, through the state, in matrices


def test_heat_writes_small_tables_out_and_scales_signed_ones_around_zero():
    fig, ax = plots.figure()
    image = wkv_pictures.heat(ax, np.array([[0.0, 2.0]]), ("a",), (" ", "\n"))
    assert [text.get_text() for text in ax.texts] == ["2"] and image.get_clim() == (0, 2)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["␣", "⏎"]
    fig, ax = plots.figure()
    assert wkv_pictures.heat(ax, np.array([[-3.0, 2.0]]), signed=True).get_clim() == (-3, 3)
    assert plots.png(wkv_pictures.matrix_figure(np.eye(3), "rows", "columns", "y", "x")).startswith(PNG)
    assert plots.png(wkv_pictures.weights_figure(np.eye(4), "abab")).startswith(PNG)
