"""Damaged .idx/.bin pairs: each kind is named, nothing crashes or passes for good; the side file of the tokenizer."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from binidx_cases import DOCUMENTS, FIXTURE_BIN, FIXTURE_IDX, PILE, WORLD, build, content, official, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_nb.data.binidx import (
    BinidxError,
    MMapIndexedDataset,
    check_tokenizer,
    write_meta,
)

pytestmark = pytest.mark.usefixtures("no_fsync")

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
