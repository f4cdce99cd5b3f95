"""Pictures of notebook 08: they show the numbers that they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.teaching import plots
from rwkv_nb.teaching import sampling_pictures as draw

CHARS = CharTokenizer.from_text("\n abcdef")
P = torch.tensor([0.0, 0.05, 0.4, 0.3, 0.15, 0.1, 0.0, 0.0], dtype=torch.float64)
PNG = b"\x89PNG"


def test_the_way_names_every_knob():
    texts = " ".join(text.get_text() for text in draw.way().axes[0].texts)
    for name in ("model", "penalties", "bans", "softmax", "top_p", "top_k", "temperature", "draw"):
        assert name in texts and name in draw.WAY_ALT


def test_bars_have_the_same_tokens_in_every_panel_and_count_what_is_left():
    cut = torch.where(P >= 0.15, P, 0.0)
    fig = draw.bars({"before": P, "after": cut / cut.sum()}, CHARS, n=5)
    before, after = fig.axes
    assert [bar.get_width() for bar in before.patches] == pytest.approx([0.4, 0.3, 0.15, 0.1, 0.05])
    assert [bar.get_width() for bar in after.patches] == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0])
    assert [label.get_text() for label in before.get_yticklabels()] == ["a", "b", "c", "d", "␣"]
    assert "5 tokens left" in before.get_xlabel() and "3 tokens left" in after.get_xlabel()
    assert [text.get_text() for text in after.texts][-2:] == ["–", "–"]
    assert plots.png(fig).startswith(PNG)
    single = draw.bars({"one": torch.eye(8, dtype=torch.float64)[2]}, CHARS, n=3)
    assert single.axes[0].get_xlabel().endswith("1 token left")


def test_ranks_fall_and_leave_out_what_is_zero():
    [line] = draw.ranks({"p": P}).axes[0].get_lines()
    assert list(line.get_ydata()) == pytest.approx([0.4, 0.3, 0.15, 0.1, 0.05])
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]


def test_surprise_shows_every_character_on_a_ground_as_dark_as_it_was_surprising():
    fig = draw.surprise("ab c\nd", [0.0, 3.0, 6.0, 9.0, 1.0, 2.0], columns=3)
    ax = fig.axes[0]
    assert [text.get_text() for text in ax.texts] == ["a", "b", " ", "c", "⏎", "d"]
    assert [(p.get_x(), p.get_y()) for p in ax.patches] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2)]
    dark = [sum(patch.get_facecolor()[:3]) for patch in ax.patches]
    assert dark[0] > dark[4] > dark[5] > dark[1] > dark[2] == dark[3]  # darker from there on it does not get
    assert [text.get_color() for text in ax.texts] == ["black", "black", "white", "white", "black", "black"]
    with pytest.raises(ValueError):
        draw.surprise("abc", [1.0])


def test_cost_has_a_bar_for_each_way():
    fig = draw.cost({"each": 60, "once": 20})
    assert [bar.get_width() for bar in fig.axes[0].patches] == [60, 20]


def test_lines_mark_few_points_and_name_several_curves():
    fig = draw.lines({"a": ([0, 1], [2, 3]), "b": (range(30), range(30))}, "x", "y", ylim=(0, 5))
    few, many = fig.axes[0].get_lines()
    assert few.get_marker() == "o" and many.get_marker() == "None" and fig.axes[0].get_ylim() == (0, 5)
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["a", "b"]
    assert draw.lines({"a": ([0], [1])}, "x", "y").axes[0].get_legend() is None


def test_repeated_marks_what_stood_there_before():
    assert np.array_equal(draw.repeated("abcabcd", 3), [0, 0, 0, 1, 0])
    assert draw.repeated("ab" * 50).mean() > 0.9 and draw.repeated("short").size == 0
