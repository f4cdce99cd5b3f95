"""The .idx/.bin pair against bytes written by hand, an independent reader, damage of every kind and kills."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_nb.data import binidx
from rwkv_nb.data.binidx import (
    BinidxError,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    check_tokenizer,
    publish,
    recover,
    write_meta,
)

DOCUMENTS = [[33155, 0], [24281, 59, 33520, 261, 0], [65535, 0]]
WORLD = SimpleNamespace(name="rwkv_vocab_v20230424", sha256="e6dee3d4", vocab_size=65536)
PILE = SimpleNamespace(name="20B_tokenizer", sha256="aaaa", vocab_size=50277)

# Written out by hand from the layout, not by the code under test.
FIXTURE_BIN = struct.pack("<9H", 33155, 0, 24281, 59, 33520, 261, 0, 65535, 0)
FIXTURE_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)  # version
    + struct.pack("<B", 8)  # uint16
    + struct.pack("<Q", 3)  # items
    + struct.pack("<Q", 4)  # document bounds
    + struct.pack("<3i", 2, 5, 2)
    + struct.pack("<3q", 0, 4, 14)
    + struct.pack("<4q", 0, 1, 2, 3)
)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk makes thousands of tiny pairs slow. One test below replaces it by a recorder."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def build(prefix: Path, documents: list, **kwargs) -> None:
    with MMapIndexedDatasetBuilder(prefix, **kwargs) as builder:
        for document in documents:
            builder.add_item(document)
            builder.end_document()


def put(prefix: Path, idx: bytes, data: bytes) -> None:
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(data)


def official(prefix: Path) -> list[list[int]]:
    """The official reading, written again from the documented offsets: header fields one by one, then frombuffer."""
    idx, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00" and struct.unpack_from("<Q", idx, 9) == (1,)
    dtype = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 7: "f8", 8: "u2"}[idx[17]]
    (n,), (m,) = struct.unpack_from("<Q", idx, 18), struct.unpack_from("<Q", idx, 26)
    sizes = np.frombuffer(idx, "<i4", n, 34)
    pointers = np.frombuffer(idx, "<i8", n, 34 + 4 * n)
    assert len(idx) == 34 + 12 * n + 8 * m
    return [np.frombuffer(data, "<" + dtype, int(size), int(p)).tolist() if size else []
            for size, p in zip(sizes, pointers, strict=True)]


def content(prefix: Path) -> tuple:
    with MMapIndexedDataset(prefix) as data:
        return [item.tolist() for item in data], data.doc_idx.tolist(), data.dtype


# ---------------------------------------------------------------- bytes


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


# ---------------------------------------------------------------- views


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


# ---------------------------------------------------------------- what a builder refuses


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


# ---------------------------------------------------------------- damage


def damage(idx: bytes, offset: int, fmt: str, *values) -> bytes:
    copy = bytearray(idx)
    struct.pack_into(fmt, copy, offset, *values)
    return bytes(copy)


@pytest.mark.parametrize("idx, data, part, field, words", [
    (b"", FIXTURE_BIN, ".idx", "length", ["0 bytes", "34"]),
    (FIXTURE_IDX[:33], FIXTURE_BIN, ".idx", "length", ["33 bytes"]),
    (FIXTURE_IDX[:-1], FIXTURE_BIN, ".idx", "length", ["101 bytes", "102", "N = 3"]),
    (FIXTURE_IDX + b"\0", FIXTURE_BIN, ".idx", "length", ["103 bytes"]),
    (b"PK" + FIXTURE_IDX[2:], FIXTURE_BIN, ".idx", "magic", ["PK"]),
    (damage(FIXTURE_IDX, 9, "<Q", 2), FIXTURE_BIN, ".idx", "version", ["is 2", "expected 1"]),
    (damage(FIXTURE_IDX, 17, "<B", 9), FIXTURE_BIN, ".idx", "dtype code", ["is 9"]),
    (damage(FIXTURE_IDX, 17, "<B", 4), FIXTURE_BIN, ".bin", "length", ["18 bytes", "36"]),
    (damage(FIXTURE_IDX, 18, "<Q", 2**63), FIXTURE_BIN, ".idx", "length", [str(2**63)]),
    (damage(FIXTURE_IDX, 18, "<QQ", 5, 1), FIXTURE_BIN, ".idx", "pointers[0]", ["is 4"]),  # the same index length
    (damage(FIXTURE_IDX, 38, "<i", -5), FIXTURE_BIN, ".idx", "sizes[1]", ["is -5"]),
    (damage(FIXTURE_IDX, 34, "<ii", 3, 4), FIXTURE_BIN, ".idx", "pointers[1]", ["is 4", "expected 6"]),
    (damage(FIXTURE_IDX, 46, "<q", 2), FIXTURE_BIN, ".idx", "pointers[0]", ["is 2", "expected 0"]),
    (damage(FIXTURE_IDX, 62, "<q", 2**62), FIXTURE_BIN, ".idx", "pointers[2]", [str(2**62), "expected 14"]),
    (damage(FIXTURE_IDX, 70, "<q", -1), FIXTURE_BIN, ".idx", "doc_idx[0]", ["is -1"]),
    (damage(FIXTURE_IDX, 94, "<q", 4), FIXTURE_BIN, ".idx", "doc_idx[3]", ["is 4", "2 to 3"]),
    (damage(FIXTURE_IDX, 78, "<q", 3), FIXTURE_BIN, ".idx", "doc_idx[2]", ["is 2", "3 to 3"]),
    (FIXTURE_IDX, FIXTURE_BIN[:-1], ".bin", "length", ["17 bytes", "18"]),
    (FIXTURE_IDX, FIXTURE_BIN + b"\0\0", ".bin", "length", ["20 bytes", "18"]),
    (FIXTURE_IDX, b"", ".bin", "length", ["0 bytes", "18"]),
])
def test_damage_is_named(tmp_path, idx, data, part, field, words):
    put(tmp_path / "a", idx, data)
    with pytest.raises(BinidxError) as caught:
        MMapIndexedDataset(tmp_path / "a")
    message = str(caught.value)
    assert caught.value.field == field and caught.value.path == f"{tmp_path / 'a'}{part}", message
    assert all(word in message for word in [*words, part, caught.value.remedy]) and caught.value.remedy


def test_large_sums_do_not_wrap_around(tmp_path):
    n = 1 << 12
    sizes = np.full(n, 2**31 - 1, dtype="<i4")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 5, n, 0)
    pointers = np.arange(n, dtype=np.int64) * (8 * (2**31 - 1))
    put(tmp_path / "a", header + sizes.tobytes() + pointers.tobytes(), b"\0" * 8)
    with pytest.raises(BinidxError, match=str(n * 8 * (2**31 - 1))):
        MMapIndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("part", [".bin", ".idx"])
def test_missing_file(tmp_path, part):
    put(tmp_path / "a", FIXTURE_IDX, FIXTURE_BIN)
    os.remove(f"{tmp_path / 'a'}{part}")
    with pytest.raises(BinidxError, match=rf"a\{part}: file is missing.*without .bin"):
        MMapIndexedDataset(tmp_path / "a")


HEADER_AND_ITEMS = range(34 + 12 * 3)  # everything but doc_idx, of which several contents are possible


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_an_error_or_harmless(tmp_path, data):
    good = (DOCUMENTS, [0, 1, 2, 3], np.uint16)
    build(tmp_path / "a", DOCUMENTS, tokenizer=WORLD)  # the side file gives a swapped dtype code away
    idx = bytearray(FIXTURE_IDX)
    for _ in range(data.draw(st.integers(1, 3))):
        idx[data.draw(st.sampled_from(HEADER_AND_ITEMS))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(idx))))
    (tmp_path / "a.idx").write_bytes(idx[:cut])
    try:
        found = content(tmp_path / "a")
    except BinidxError:
        return
    assert found == good


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=120))
def test_random_bytes_never_crash(tmp_path, junk):
    for idx in (junk, FIXTURE_IDX[:34] + junk):
        put(tmp_path / "a", idx, FIXTURE_BIN)
        try:
            items = content(tmp_path / "a")[0]
        except BinidxError:
            continue
        assert items == DOCUMENTS


# ---------------------------------------------------------------- the tokenizer's name


def test_meta_and_tokenizer_check(tmp_path):
    prefix = tmp_path / "a"
    build(prefix, DOCUMENTS, tokenizer=WORLD)
    assert MMapIndexedDataset(prefix).meta == {
        "tokenizer": "rwkv_vocab_v20230424", "sha256": "e6dee3d4", "vocab_size": 65536,
        "dtype": "uint16", "n_items": 3, "n_tokens": 9}
    check_tokenizer(prefix, WORLD.name, WORLD.sha256)
    check_tokenizer(prefix, "the same by another name", WORLD.sha256)
    check_tokenizer(prefix, WORLD.name)
    for arguments in [(PILE.name, PILE.sha256), (PILE.name,), (WORLD.name, "another file")]:
        with pytest.raises(BinidxError) as caught:
            check_tokenizer(prefix, *arguments)
        assert WORLD.name in str(caught.value) and arguments[0] in str(caught.value)
    os.remove(f"{prefix}.meta.json")
    check_tokenizer(prefix, PILE.name, PILE.sha256)  # official data has no such file
    write_meta(prefix, PILE)
    check_tokenizer(prefix, PILE.name, PILE.sha256)
    assert official(prefix) == DOCUMENTS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.meta.json"]


def test_meta_of_another_pair(tmp_path):
    build(tmp_path / "a", DOCUMENTS, tokenizer=WORLD)
    put(tmp_path / "a", FIXTURE_IDX[:17] + b"\x03" + FIXTURE_IDX[18:], FIXTURE_BIN)  # int16: the same width
    with pytest.raises(BinidxError, match="dtype is 'uint16', expected 'int16'"):
        MMapIndexedDataset(tmp_path / "a")
    build(tmp_path / "b", DOCUMENTS[:2])
    put(tmp_path / "a", (tmp_path / "b.idx").read_bytes(), (tmp_path / "b.bin").read_bytes())
    with pytest.raises(BinidxError, match="n_items is 3, expected 2"):
        MMapIndexedDataset(tmp_path / "a")
    write_meta(tmp_path / "a", WORLD)
    assert content(tmp_path / "a")[0] == DOCUMENTS[:2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": "x"}', '{"tokenizer": 3}', "\udcff"])
def test_meta_that_cannot_be_read(tmp_path, text):
    put(tmp_path / "a", FIXTURE_IDX, FIXTURE_BIN)
    (tmp_path / "a.meta.json").write_bytes(text.encode(errors="surrogateescape"))
    for call in (lambda: MMapIndexedDataset(tmp_path / "a"), lambda: check_tokenizer(tmp_path / "a", "x")):
        with pytest.raises(BinidxError, match="meta.json"):
            call()


# ---------------------------------------------------------------- all or nothing


NEW = [[1, 2, 3, 0]]


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_exception_leaves_the_old_pair(tmp_path):
    build(tmp_path / "a", DOCUMENTS, tokenizer=WORLD)
    before = files(tmp_path)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), MMapIndexedDatasetBuilder(tmp_path / "a", tokenizer=PILE) as builder:
            builder.add_item([1])
            raise error
        assert files(tmp_path) == before
    build(tmp_path / "a", NEW)
    assert content(tmp_path / "a")[0] == NEW and MMapIndexedDataset(tmp_path / "a").meta is None  # the old meta went


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def stop_at(monkeypatch, step: int) -> None:
    """The step-th call that changes the folder, and every later one, does not happen."""
    calls = [0]

    def guard(function):
        def guarded(*args):
            calls[0] += 1
            if calls[0] > step:
                raise Killed
            return function(*args)
        return guarded

    monkeypatch.setattr(os, "replace", guard(os.replace))
    monkeypatch.setattr(os, "remove", guard(os.remove))


@pytest.mark.parametrize("old", [None, WORLD, "without meta"])
@pytest.mark.parametrize("new", [None, PILE])
@pytest.mark.parametrize("again", [0, 1, 2])
def test_kill_at_every_step_of_publication(tmp_path, old, new, again):
    """Killed at step k of publish, again at step `again` of recover: the old or the new pair, never a mixture."""
    outcomes = []
    for step in range(12):
        prefix = tmp_path / f"{step}"
        if old is not None:
            build(prefix, DOCUMENTS, tokenizer=None if old == "without meta" else old)
        build(tmp_path / "next", NEW, tokenizer=new)
        for part in (".bin", ".idx", ".meta.json"):
            if os.path.exists(f"{tmp_path / 'next'}{part}"):
                os.replace(f"{tmp_path / 'next'}{part}", f"{prefix}{part}.tmp")
        finished = True
        for run, limit in [(publish, step), (recover, again)]:
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, limit)
                try:
                    run(prefix)
                except Killed:
                    finished = False
            if finished:
                break
        if old is None and not (os.path.exists(f"{prefix}.idx.new") or os.path.exists(f"{prefix}.idx")):
            outcomes.append("nothing")
        else:
            with MMapIndexedDataset(prefix) as data:  # recovers by itself
                items, meta = [item.tolist() for item in data], data.meta
            outcomes.append("new" if items == NEW else "old")
            tokenizer = new if items == NEW else (old if old is WORLD else None)
            assert items in (NEW, DOCUMENTS)
            assert (meta or {}).get("tokenizer") == (tokenizer.name if tokenizer else None)
        build(prefix, DOCUMENTS)  # a next writer finds its way
        left = {path.name for path in tmp_path.iterdir() if path.name.startswith(f"{step}.")}
        assert content(prefix)[0] == DOCUMENTS and left == {f"{step}.bin", f"{step}.idx"}
    assert outcomes == sorted(outcomes, key=["nothing", "old", "new"].index)  # a single point of commitment
    assert outcomes[0] != "new" and outcomes[-1] == "new"


def test_publication_first_finishes_an_earlier_one(tmp_path):
    """Else the next .bin.new would come under the index of the pair committed before."""
    for step in range(12):
        prefix = tmp_path / f"{step}"
        build(prefix, NEW)
        for part in (".bin", ".idx"):
            os.replace(f"{prefix}{part}", f"{prefix}{part}.new")
        put(tmp_path / "next", FIXTURE_IDX, FIXTURE_BIN)
        for part in (".bin", ".idx"):
            os.replace(f"{tmp_path / 'next'}{part}", f"{prefix}{part}.tmp")
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Killed) if step < 8 else contextlib.nullcontext():
                publish(prefix)
        assert content(prefix)[0] == (NEW if step < 5 else DOCUMENTS)


def test_real_kill(tmp_path):
    """SIGKILL inside a writing process, at each rename."""
    program = """
import os, signal, sys
from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
real, left = os.replace, [int(sys.argv[2])]
def replace(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = replace
with MMapIndexedDatasetBuilder(sys.argv[1]) as builder:
    builder.add_item([1, 2, 3, 0])
    builder.end_document()
"""
    seen = []
    for step in range(6):
        build(tmp_path / "a", DOCUMENTS)
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a"), str(step)], check=False)
        assert done.returncode == (-9 if step < 5 else 0)
        seen.append(content(tmp_path / "a")[0] == NEW)
        assert seen[-1] or content(tmp_path / "a")[0] == DOCUMENTS
    assert seen == [False, False, True, True, True, True]


def test_data_reach_the_disk_before_a_rename(tmp_path, monkeypatch):
    events = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(Path(new).name), replace(old, new)))
    build(tmp_path / "a", NEW, tokenizer=WORLD)
    of = {name: os.stat(tmp_path / f"a{name}").st_ino for name in (".bin", ".meta.json", ".idx")}
    folder = os.stat(tmp_path).st_ino
    assert events[:3] == [of[".bin"], of[".idx"], of[".meta.json"]]
    assert [event for event in events[3:] if event != folder] == [
        "a.bin.new", "a.meta.json.new", "a.idx.new", "a.bin", "a.meta.json", "a.idx"]
    for name in ("a.idx.new", "a.idx"):  # before each of the two, the renames so far
        assert events[events.index(name) - 1] == folder
    assert events[-1] == folder


def test_recover_helps_and_says_so(tmp_path):
    assert recover(tmp_path / "a") is False
    build(tmp_path / "a", NEW)
    for part in (".bin", ".idx"):
        os.replace(f"{tmp_path / 'a'}{part}", f"{tmp_path / 'a'}{part}.new")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with pytest.raises(BinidxError, match="cannot be finished .Permission denied.*Open the pair once"):
            MMapIndexedDataset(tmp_path / "a")
    assert recover(tmp_path / "a") is True
    assert content(tmp_path / "a")[0] == NEW
    (tmp_path / "a.bin.new").write_bytes(b"half")
    assert recover(tmp_path / "a") is False and not (tmp_path / "a.bin.new").exists()
    with pytest.raises(BinidxError, match="bin.tmp: file is missing"):
        publish(tmp_path / "a")


def test_import_is_light():
    code = "import sys, rwkv_nb.data.binidx; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
