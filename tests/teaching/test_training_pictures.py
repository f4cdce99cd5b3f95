"""Pictures of notebook 07: what is drawn is what was given."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_nb.teaching import training_pictures as draw


def test_smooth_is_the_mean_of_what_came_before():
    values = [4.0, 2.0, 0.0, 6.0]
    assert draw.smooth(values, 1).tolist() == values
    assert draw.smooth(values, 3).tolist() == pytest.approx([4, 3, 2, 8 / 3])
    rng = np.random.default_rng(0).normal(size=50)
    assert draw.smooth(list(rng), 7)[20] == pytest.approx(rng[14:21].mean())


def test_curves_have_one_line_each_and_keep_their_steps():
    fig = draw.curves({"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0, 1.0]}, "loss", every=2)
    first, second = fig.axes[0].get_lines()
    assert first.get_xdata().tolist() == [0, 2] and first.get_ydata().tolist() == [3.0, 1.0]
    assert first.get_linestyle() != second.get_linestyle()


def test_ladder_marks_the_model():
    ax = draw.ladder({"uniform": 6.6, "bigram": 3.5, "model": 1.6}, models=1).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [6.6, 3.5, 1.6]
    assert ax.patches[0].get_facecolor() == ax.patches[1].get_facecolor() != ax.patches[2].get_facecolor()


def test_the_loop_names_every_stage():
    words = {text.get_text() for text in draw.loop().axes[0].texts}
    assert {name for name, _ in draw.STAGES} | {"schedule", "the next batch"} <= words
    assert all(name in draw.LOOP_ALT for name, _ in draw.STAGES)
