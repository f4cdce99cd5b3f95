"""The .idx/.bin pair against bytes written by hand and an independent reader; what a builder refuses."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from binidx_cases import DOCUMENTS, FIXTURE_BIN, FIXTURE_IDX, build, content, official, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_nb.data import binidx
from rwkv_nb.data.binidx import (
    BinidxError,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
)

pytestmark = pytest.mark.usefixtures("no_fsync")

def test_bytes_of_a_tiny_pair(tmp_path):
    build(tmp_path / "tiny", DOCUMENTS)
    assert (tmp_path / "tiny.bin").read_bytes() == FIXTURE_BIN
    assert (tmp_path / "tiny.idx").read_bytes() == FIXTURE_IDX
    assert len(FIXTURE_IDX) == 42 + 20 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.bin", "tiny.idx"]


def test_reader_on_the_hand_written_pair(tmp_path):
    put(tmp_path / "tiny", FIXTURE_IDX, FIXTURE_BIN)
    data = MMapIndexedDataset(str(tmp_path / "tiny"))
    assert len(data) == 3 and data.n_tokens == 9 and data.dtype == np.uint16 and data.meta is None
    assert [item.tolist() for item in data] == DOCUMENTS
    assert data[-1].tolist() == DOCUMENTS[-1] and data[np.int64(1)].tolist() == DOCUMENTS[1]
    assert [item.tolist() for item in data[1:3]] == DOCUMENTS[1:] and data[2:1] == []
    assert data.sizes.tolist() == [2, 5, 2] and data.doc_idx.tolist() == [0, 1, 2, 3]
    assert data.tokens.tolist() == sum(DOCUMENTS, [])
    assert data.get(1, 2).tolist() == [33520, 261, 0] and data.get(1, 1, 2).tolist() == [59, 33520]
    assert data.get(0, 1, 5).tolist() == [0, 24281, 59, 33520, 261]  # through the document's end, as windows are read
    assert data.get(2, 2).tolist() == []
    for arguments in [(0, 5, 5), (0, -1, 2), (0, 0, -1), (1, 6), (2, 0, 3)]:
        with pytest.raises(ValueError, match="9 tokens"):
            data.get(*arguments)
    for i in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            data[i]
    with pytest.raises(TypeError):
        data["0"]


def test_several_items_a_document(tmp_path):
    with MMapIndexedDatasetBuilder(tmp_path / "a") as builder:
        builder.add_item([1, 2])
        builder.add_item((3,))
        builder.end_document()
        builder.add_item([])
        builder.end_document()
    assert content(tmp_path / "a") == ([[1, 2], [3], []], [0, 2, 3], np.uint16)


def test_no_items(tmp_path):
    build(tmp_path / "a", [])
    data = MMapIndexedDataset(tmp_path / "a")
    assert len(data) == data.n_tokens == 0 and data.doc_idx.tolist() == [0] and data[:] == []
    assert not data.tokens.flags.writeable
    build(tmp_path / "b", [[]])  # an item, but an empty .bin
    assert content(tmp_path / "b") == ([[]], [0, 1], np.uint16)


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "int32", "int64", "uint16", "float32", "float64"])
def test_every_dtype(tmp_path, name):
    documents = [[1, 2, 3], [100], [7, 8]]
    build(tmp_path / "a", [np.array(d, dtype=name) for d in documents], dtype=name)
    assert content(tmp_path / "a") == (documents, [0, 1, 2, 3], np.dtype(name))
    if name != "float32":  # the official reader fails on that one
        assert official(tmp_path / "a") == documents


@pytest.mark.parametrize("code", [6, 7])
@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("verify", [True, False])
def test_float_codes_are_decided_by_the_file_length(tmp_path, code, name, verify):
    build(tmp_path / "a", [np.array([1.5, -2.0]), np.array([0.25])], dtype="float64")
    idx = bytearray((tmp_path / "a.idx").read_bytes())
    idx[17] = code
    struct.pack_into("<2q", idx, 34 + 8, 0, 2 * np.dtype(name).itemsize)
    put(tmp_path / "a", bytes(idx), np.array([1.5, -2.0, 0.25], dtype=name).tobytes())
    data = MMapIndexedDataset(tmp_path / "a", verify=verify)
    assert data.dtype == name and data.tokens.tolist() == [1.5, -2.0, 0.25]


def test_index_in_blocks_is_the_same(tmp_path, monkeypatch):
    sizes = [5, 0, 3, 1, 9, 2, 0]
    documents = [list(range(size)) for size in sizes]
    build(tmp_path / "whole", documents)
    import rwkv_nb.data.binidx_builder as builder_module
    monkeypatch.setattr(builder_module, "BLOCK", 2)
    monkeypatch.setattr(binidx, "BLOCK", 3)
    build(tmp_path / "blocks", documents)
    binidx.write_index(tmp_path / "one_each.idx", np.array(sizes))
    whole = (tmp_path / "whole.idx").read_bytes()
    assert whole == (tmp_path / "blocks.idx").read_bytes() == (tmp_path / "one_each.idx").read_bytes()
    assert content(tmp_path / "blocks")[0] == documents
    for offset, field in [(34 + 28 + 8 * 5, r"pointers\[5\]"), (34 + 84 + 8 * 4, r"doc_idx\[[45]\]")]:
        damaged = bytearray(whole)
        damaged[offset] += 1
        put(tmp_path / "damaged", bytes(damaged), (tmp_path / "whole.bin").read_bytes())
        if "doc" in field:
            damaged[offset] += 3
            put(tmp_path / "damaged", bytes(damaged), (tmp_path / "whole.bin").read_bytes())
        with pytest.raises(BinidxError, match=field):
            MMapIndexedDataset(tmp_path / "damaged")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=12))
def test_round_trip(tmp_path, documents):
    build(tmp_path / "a", documents)
    assert content(tmp_path / "a") == (documents, list(range(len(documents) + 1)), np.uint16)
    assert official(tmp_path / "a") == documents
    assert os.path.getsize(tmp_path / "a.idx") == 42 + 20 * len(documents)


def test_views_are_read_only_and_outlive_the_dataset(tmp_path):
    put(tmp_path / "tiny", FIXTURE_IDX, FIXTURE_BIN)
    with MMapIndexedDataset(tmp_path / "tiny") as data:
        views = [data[1], data.tokens, data.sizes, data.doc_idx, data.get(0, 1, 3), data[0:2][0]]
    with pytest.raises(ValueError, match="closed"):
        data[0]
    del data
    assert views[0].tolist() == DOCUMENTS[1] and views[1].tolist() == sum(DOCUMENTS, [])
    for view in views:
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    assert views[0].base is not None  # a view, not a copy


def test_pickles_as_a_path(tmp_path):
    build(tmp_path / "a", [list(range(5000))] * 10)
    data = MMapIndexedDataset(tmp_path / "a")
    raw = pickle.dumps(data)
    assert len(raw) < 1000 and pickle.loads(raw)[3].tolist() == list(range(5000))


@pytest.mark.parametrize("bad, words", [
    ([1, 70000], ["item 1", "70000", "uint16"]),
    (np.array([5, -1]), ["item 1", "-1", "uint16"]),
    (np.array([1.5, 2.0]), ["item 1", "1.5", "float64"]),
    ([2**70], ["item 1", str(2**70)]),
    ([True, False], ["item 1", "bool"]),
    ([[1, 2]], ["item 1", "(1, 2)"]),
])
def test_add_item_refuses(tmp_path, bad, words):
    builder = MMapIndexedDatasetBuilder(tmp_path / "a")
    builder.add_item([1, 2, 65535])
    with pytest.raises(ValueError) as caught:
        builder.add_item(bad)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    builder.add_item(np.array([7, 8], dtype=np.int64))  # other integers are fine as long as they fit
    builder.finalize()
    assert content(tmp_path / "a")[0] == [[1, 2, 65535], [7, 8]]
    with pytest.raises(ValueError, match="finished"):
        builder.add_item([1])
    with pytest.raises(ValueError, match="finished"):
        builder.finalize()


def test_builder_refuses_dtype_and_folder(tmp_path):
    with pytest.raises(ValueError, match="complex128"):
        MMapIndexedDatasetBuilder(tmp_path / "a", dtype=complex)
    with pytest.raises(ValueError, match="nowhere"):
        MMapIndexedDatasetBuilder(tmp_path / "nowhere" / "a")
    with (pytest.raises(ValueError, match="float64"),
          MMapIndexedDatasetBuilder(tmp_path / "f", dtype="float32") as builder):
        builder.add_item([0.1])
    assert list(tmp_path.iterdir()) == []


def test_short_write_is_noticed(tmp_path):
    build(tmp_path / "a", DOCUMENTS)
    builder = MMapIndexedDatasetBuilder(tmp_path / "a")
    builder.add_item([1, 2, 3])
    builder._file.write(b"xx")  # what a write that failed half-way leaves
    with pytest.raises(BinidxError, match="length is 8, expected 6"):
        builder.finalize()
    assert content(tmp_path / "a")[0] == DOCUMENTS and len(list(tmp_path.iterdir())) == 2


def test_import_is_light():
    code = "import sys, rwkv_nb.data.binidx; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
