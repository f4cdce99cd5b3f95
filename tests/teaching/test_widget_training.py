"""The schedule panel of notebook 07: what it says is what the formulas give."""

from __future__ import annotations

import math
import re

import pytest

from rwkv_nb.teaching.widgets import training as draw
from rwkv_nb.training.config import TrainConfig

PNG = b"\x89PNG"
RUN = TrainConfig(  # the article's run on minipile
    my_pile_stage=3, magic_prime=2926181, my_exit_tokens=1498226207, ctx_len=512, micro_bsz=16, warmup_steps=10,
    lr_init=6e-4, lr_final=6e-5,
)  # fmt: skip


def test_steps_by_tokens_and_by_mini_epochs():
    assert draw.steps_of(RUN) == math.ceil(1498226207 / 8192) == 182889
    assert draw.steps_of(RUN.replace(my_exit_tokens=-8193)) == 2
    assert draw.steps_of(RUN.replace(my_exit_tokens=0)) == 72 * 2520


def test_the_curve_starts_and_ends_where_the_flags_say():
    steps, rates = draw.curve(RUN, draw.steps_of(RUN))
    assert steps[0] == 0 and steps[-1] == 182889 and steps == sorted(set(steps)) and len(steps) == len(rates) == 401
    assert rates[0] == pytest.approx(6e-6) and rates[-1] == pytest.approx(6e-5)
    middle = steps[200]
    wave = math.cos(math.pi * (middle - 10) / (1498226207 / 8192 - 10))
    assert rates[200] == pytest.approx(3.3e-4 + 2.7e-4 * wave, rel=1e-12)
    assert draw.curve(RUN, 7)[0] == list(range(8))


def test_the_first_steps_show_the_warm_up():
    assert draw.first_steps(RUN) == 20
    assert draw.first_steps(RUN.replace(warmup_steps=100)) == 200
    assert draw.first_steps(RUN.replace(my_exit_tokens=8192 * 12)) == 12


def test_moments_are_in_order_and_name_the_warm_up_only_if_there_is_one():
    assert [what for what, _, _ in draw.moments(RUN)][:2] == ["first step", "warm-up over"]
    assert draw.moments(RUN)[1][1:] == (10, pytest.approx(6e-4))
    names = [what for what, _, _ in draw.moments(RUN.replace(warmup_steps=-1))]
    assert names == ["first step", "quarter", "half", "three quarters", "last step"]
    late = draw.moments(RUN.replace(warmup_steps=100_000))
    assert [step for _, step, _ in late] == sorted(step for _, step, _ in late)


def test_the_figure_has_a_line_for_every_run():
    fig = draw.schedule_figure({"a": RUN, "b": RUN.replace(recipe="seed"), "c": RUN.replace(my_exit_tokens=0)})
    assert [len(ax.get_lines()) for ax in fig.axes] == [3, 3]
    assert len({(line.get_color(), line.get_linestyle()) for line in fig.axes[0].get_lines()}) == 3


def rate_at(panel, what: str) -> float:
    return float(re.search(rf"{what}</th>.*?<td[^>]*>[\d,]+</td><td[^>]*>([^<]+)<", panel.report.value)[1])


def test_panel_follows_its_flags():
    panel = draw.panel(RUN)
    assert "182,889 steps of 8,192 tokens" in panel.report.value and bytes(panel.picture.value).startswith(PNG)
    assert rate_at(panel, "first step") == pytest.approx(6e-6)
    before = bytes(panel.picture.value)
    panel.recipe.value = "seed"
    assert rate_at(panel, "first step") == pytest.approx(1.2e-4) and bytes(panel.picture.value) != before
    panel.warmup_steps.value = 0
    assert rate_at(panel, "first step") == pytest.approx(6e-4)
    panel.lr_init.value, panel.lr_final.value = 1e-3, 1e-5
    assert rate_at(panel, "first step") == pytest.approx(1e-3) and rate_at(panel, "last step") == pytest.approx(1e-5)
    panel.my_exit_tokens.value = 0
    assert "181,440 steps" in panel.report.value and "until it is interrupted" in panel.report.value
    assert rate_at(panel, "half") == pytest.approx(1e-4, rel=1e-2)  # exponential: half-way is the geometric mean
    assert panel.error.value == ""


def test_panel_says_what_is_impossible_and_recovers():
    panel = draw.panel(RUN)
    shown = panel.report.value
    panel.my_exit_tokens.value = 8192 * 5
    assert "warmup_steps=10" in panel.error.value and panel.report.value == shown
    panel.warmup_steps.value = 0
    assert panel.error.value == "" and "5 steps of" in panel.report.value
