"""The hex dump names every byte once, in HTML and as text; the figures draw what they say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.teaching.widgets import binidx as pictures

DOCUMENTS = [[33155, 0], [24281, 59, 3880, 0], [10381, 0]]


@pytest.fixture
def dumps(tmp_path):
    with MMapIndexedDatasetBuilder(tmp_path / "a") as builder:
        for ids in DOCUMENTS:
            builder.add_item(ids)
            builder.end_document()
    return pictures.dump_pair(str(tmp_path / "a"))


@pytest.mark.parametrize("which", [0, 1])
def test_every_byte_has_one_field(dumps, which):
    dump = dumps[which]
    owned = [byte for field in dump.fields for byte in range(field.start, field.start + field.length)]
    assert owned == list(range(len(dump.data)))
    shown = [byte for row in dump.rows() for _, at, stop in row for byte in range(at, stop)]
    assert shown == owned
    page = dump._repr_html_()
    cells = re.findall(r">([0-9a-f]{2}(?: [0-9a-f]{2})*)<br>", page)
    assert bytes.fromhex(" ".join(cells)) == dump.data
    assert all(f"<small>{field.name}</small>" in page for field in dump.fields)  # names, not colour alone
    assert "background:#" in page and "color:#000" in page  # readable in dark mode


def test_text_form_says_names_and_values(dumps):
    lines = repr(dumps[0]).splitlines()
    assert "a.idx, 102 bytes" in lines[0]
    assert [line.split()[-1] for line in lines if "pointers[" in line] == ["0", "4", "12"]
    assert [line.split()[-1] for line in lines if "sizes[" in line] == ["2", "4", "2"]
    assert any(line.endswith("8 = uint16") for line in lines)
    tokens = [line.split() for line in repr(dumps[1]).splitlines()[2:]]
    assert [(line[-2], int(line[-1])) for line in tokens] == [
        (f"{i}:{p}", token) for i, ids in enumerate(DOCUMENTS) for p, token in enumerate(ids)]


def test_windows_figure_marks_the_ends_inside():
    ax = pictures.windows_figure(np.array([10, 7, 30]), ctx_len=8, first=0, count=4).axes[0]
    crosses = [line.get_xdata().tolist() for line in ax.lines[1::2]]
    assert crosses == [[], [10], [17], []]
    assert [line.get_linestyle() for line in ax.lines[0::2]] == ["-", "--", "--", "-"]
    assert [text.get_text() for text in ax.texts] == ["doc 0", "doc 1", "doc 2"]


def test_order_figure_draws_places():
    ax = pictures.order_figure([[0, 1, 2], [2, 0, 1]], ["file", "epoch 1"]).axes[0]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, 1], [1, 2], [2, 0]]
    assert len(pictures.pair_figure().axes[0].texts) > 10 and pictures.PAIR_ALT
