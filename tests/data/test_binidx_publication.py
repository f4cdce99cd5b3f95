"""A pair appears whole or not at all: exceptions and kills at every step."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from binidx_cases import DOCUMENTS, FIXTURE_BIN, FIXTURE_IDX, PILE, WORLD, build, content, put

from rwkv_nb.data.binidx import (
    BinidxError,
    MMapIndexedDataset,
    MMapIndexedDatasetBuilder,
    publish,
    recover,
)

pytestmark = pytest.mark.usefixtures("no_fsync")

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
