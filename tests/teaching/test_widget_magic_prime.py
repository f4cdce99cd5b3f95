"""The panel of notebook 03 and its counts: set a value, read what it says."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rwkv_nb.data.magic_prime import sample_offset
from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import magic_prime as draw

PNG = b"\x89PNG"


def test_visits_counts_every_chunk():
    assert draw.visits([0, 2, 2, 4], 6).tolist() == [1, 0, 2, 0, 1, 0]


def test_repeats_tells_permutations_from_others():
    assert draw.repeats(47) == "every one of the 47 chunks exactly once"
    assert draw.repeats(43) == "15 of 43 chunks, some 3 times; 28 never"
    assert "not counted" in draw.repeats(2926181)


def test_rows_figure_draws_one_line_for_each_chunk_that_is_read():
    fig = draw.rows_figure((47, 43))
    lines = [len(ax.collections[0].get_segments()) for ax in fig.axes]
    dots = [len(ax.lines[0].get_xdata()) for ax in fig.axes]
    assert (lines, dots) == ([47, 15], [47, 43])
    assert [ax.get_title().split(": ")[1] for ax in fig.axes] == ["47 of 47 chunks", "15 of 43 chunks"]


def test_panel_follows_its_controls():
    panel = draw.panel(200499, 512, 2)
    assert "magic_prime = 389" in panel.report.value and bytes(panel.picture.value).startswith(PNG)
    before = bytes(panel.picture.value)
    panel.ctx_len.value = 4096
    assert "magic_prime = 47" in panel.report.value and "December 2023" in panel.report.value
    assert bytes(panel.picture.value) != before
    panel.world_size.value = 3
    assert panel.report.value.count("rank ") == 3
    panel.p.value = 43
    assert "15 of 43 chunks" in panel.report.value
    panel.p.value = 401
    assert "too large" in panel.report.value
    panel.tokens.value, panel.p.value = 1498226207, 0
    panel.ctx_len.value = 512
    assert "magic_prime = 2926181" in panel.report.value and "925941248" in panel.report.value
    assert panel.error.value == ""


def test_panel_explains_missing_primes_and_recovers():
    panel = draw.panel(100, 64, 1)
    assert "fewer than 3 * ctx_len = 192" in panel.report.value and bytes(panel.picture.value) == b""
    panel.ctx_len.value = 8
    assert "magic_prime = 11" in panel.report.value and bytes(panel.picture.value).startswith(PNG)
    panel.ctx_len.value = 64
    panel.p.value = 1
    assert "prime must be at least 2" in panel.error.value  # shown, not swallowed
    panel.p.value = 2
    assert panel.error.value == ""


def test_report_shows_the_first_offsets_of_each_rank():
    cells = re.findall(r"<td[^>]*>(\d+)</td>", draw.report_html(200499, 512, 2))
    expected = [sample_offset(389, 512, 0, i, rank, 2) for rank in range(2) for i in range(5)]
    assert list(map(int, cells)) == expected


def test_panel_has_a_text_form_and_named_controls():
    panel = draw.panel()
    assert "needs a running kernel" in repr(panel)
    for control in (panel.tokens, panel.ctx_len, panel.world_size, panel.p):
        assert control.description


@pytest.mark.parametrize("figure", [
    lambda: draw.walk_figure(47, 3), lambda: draw.visits_figure({"a": np.ones(5, int), "b": np.array([0, 3])}),
    lambda: draw.strips_figure({"a": np.array([0.1, 0.9]), "b": np.array([0.5])}, "place"),
    lambda: draw.orders_figure({"a": np.arange(47), "b": np.arange(47)[::-1]})])
def test_figures_draw(figure):
    fig = figure()
    assert plots.png(fig).startswith(PNG)
    assert any(ax.get_xlabel() for ax in fig.axes)


def test_walk_figure_plots_the_walk():
    fig = draw.walk_figure(47, world_size=2, samples=10)
    x, y = fig.axes[0].lines[1].get_data()
    assert list(x) == [2, 4, 6, 8, 10] and [c * 8 for c in y] == [sample_offset(47, 8, 0, i, 1, 2) for i in range(5)]
