"""make_data in trouble: workers that die, a full disk, SIGKILL at any moment."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from make_data_cases import Unpicklable, assert_official, leftovers, make_data, write_lines

from rwkv_nb.data import encoders, jsonl
from rwkv_nb.data import make_data as module
from rwkv_nb.data.binidx import BinidxError, MMapIndexedDataset
from rwkv_nb.data.make_data import JsonlError


def test_any_number_of_workers_gives_the_same_files_and_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BATCH", 500)  # many batches
    texts = [f"document {i} " + "müsli " * (i % 17) for i in range(300)]
    source = write_lines(tmp_path / "in.jsonl", texts)
    one, two = (make_data(source, tmp_path / f"w{w}", 2, 32, 5, workers=w) for w in (1, 2))
    for part in (".bin", ".idx"):
        assert (tmp_path / f"w1{part}").read_bytes() == (tmp_path / f"w2{part}").read_bytes()
    assert (one.tokens, one.magic, one.first, one.last) == (two.tokens, two.magic, two.first, two.last)
    source.write_text(source.read_text().replace('{"text": "document 123', '{"txt": "document 123') + "bad\n")
    with pytest.raises(JsonlError, match="line 124: no \"text\""):
        make_data(source, tmp_path / "w2", 2, 32, 5, workers=2)
    assert_official(tmp_path / "w2", write_lines(tmp_path / "in.jsonl", texts), 2, 5)


TROUBLE = """
import os, signal
from rwkv_nb.data.tokenizer import WorldTokenizer

class Dying(WorldTokenizer):  # takes its process with it, like the kernel when memory runs out
    def encode_batch(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)

class Failing(WorldTokenizer):
    def encode_batch(self, texts):
        raise ValueError("the tokenizer has a headache")

class Odd(Exception):  # can be pickled, but not unpickled: pickle calls it with one argument
    def __init__(self, what, where):
        super().__init__(what + where)

class Odder(WorldTokenizer):
    def encode_batch(self, texts):
        raise Odd("lost ", "in the post")

class Homesick(WorldTokenizer):  # cannot be used in another process
    def __setstate__(self, state):
        raise LookupError("no such file there")

class Chatty(WorldTokenizer):  # prints where the answers go
    def encode_batch(self, texts):
        print("hello from the worker", flush=True)
        os.write(1, b"and hello")
        return super().encode_batch(texts)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_trouble_in_a_worker_reaches_the_user(tmp_path, monkeypatch, capfd):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "trouble.py").write_text(TROUBLE)
    monkeypatch.syspath_prepend(tmp_path / "lib")  # workers inherit it
    trouble = importlib.import_module("trouble")
    source, before = write_lines(tmp_path / "in.jsonl", ["a", "b"]), psutil.Process().children()
    for kind, error, message in ((trouble.Dying, ChildProcessError, "a worker process died.*-9.*fewer workers"),
                                 (trouble.Failing, ValueError, "headache"),
                                 (trouble.Odder, RuntimeError, "Odd in a worker process: lost in the post"),
                                 (trouble.Homesick, ValueError, "no such file there.*use workers=1")):
        with pytest.raises(error, match=message):
            make_data(source, tmp_path / "out", 1, 1, 0, workers=2, tokenizer=kind())
        assert psutil.Process().children() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "lib"]
    make_data(source, tmp_path / "out", 1, 1, 0, workers=2, tokenizer=trouble.Chatty())
    assert_official(tmp_path / "out", source, 1, 0)
    shown = capfd.readouterr()
    assert shown.out == "" and "hello from the worker" in shown.err


def test_a_large_file_is_tokenised_beside_us_unless_the_tokenizer_is_a_custom_one(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "BATCH", 500)
    source = write_lines(tmp_path / "in.jsonl", [f"document {i} " + "müsli " * (i % 17) for i in range(300)])
    started, real, before = [], encoders._Process, psutil.Process().children()
    monkeypatch.setattr(encoders, "_Process", lambda *args, **options: started.append(1) or real(*args, **options))
    make_data(source, tmp_path / "small", 2, 1, 5)
    assert started == []
    monkeypatch.setattr(module, "LARGE", source.stat().st_size)
    make_data(source, tmp_path / "large", 2, 1, 5)
    assert started == [1] and psutil.Process().children() == before
    make_data(source, tmp_path / "custom", 2, 1, 5, tokenizer=Unpicklable())
    assert started == [1]
    for name in ("small", "large", "custom"):
        assert_official(tmp_path / name, source, 2, 5)


def test_what_is_read_back_must_be_what_was_written(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", ["some text", "more of it"])
    real = module._verify

    def damaged(prefix, *args):
        data = bytearray(Path(prefix + ".bin").read_bytes())
        data[0] ^= 1
        Path(prefix + ".bin").write_bytes(data)
        return real(prefix, *args)

    monkeypatch.setattr(module, "_verify", damaged)
    with pytest.raises(BinidxError, match="checksum is .*, expected .*, as was written"):
        make_data(source, tmp_path / "out", 1, 1, 0)


def test_full_disk_leaves_the_old_pair(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", ["some text", "more of it"])
    make_data(source, tmp_path / "out", 1, 1, 0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module.MMapIndexedDatasetBuilder, "add_item", full)
    with pytest.raises(OSError, match="the disk became full; nothing was changed"):
        make_data(source, tmp_path / "out", 2, 1, 0)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_at_any_moment_it_leaves_the_old_pair_or_the_new_one(tmp_path):
    """Eight runs are killed at moments spread over a run; after each, the pair is one of the two whole ones."""
    source = write_lines(tmp_path / "in.jsonl", [f"document {i} " * 40 for i in range(1500)])
    states = []
    for seed in (1, 2):
        make_data(source, tmp_path / f"seed{seed}", 8, 64, seed)
        states.append((tmp_path / f"seed{seed}.bin").read_bytes())
    for part in (".bin", ".idx", ".meta.json"):
        shutil.copy(tmp_path / f"seed1{part}", tmp_path / f"out{part}")
    code = ("import sys; from rwkv_nb.data.make_data import make_data; print('go', flush=True); "
            "make_data('in.jsonl', 'out', 8, 64, int(sys.argv[1])); print('done', flush=True)")

    def start(seed):
        child = subprocess.Popen([sys.executable, "-c", code, str(seed)], cwd=tmp_path, stdout=subprocess.PIPE)
        assert child.stdout.readline() == b"go\n"
        return child

    begin = time.perf_counter()
    assert start(1).communicate()[0] == b"done\n"
    duration = time.perf_counter() - begin
    generator, killed = random.Random(0), 0
    while killed < 8:
        child = start(2 if killed % 2 == 0 else 1)
        time.sleep(duration * (killed + generator.random()) / 8)
        child.kill()
        if child.communicate()[0] == b"done\n":
            duration *= 0.8  # the first run was a slow one
        else:
            killed += 1
        with MMapIndexedDataset(tmp_path / "out") as data:  # its checks pass
            assert data.tokens.tobytes() in states
            assert data.sizes.sum() == data.n_tokens == data.meta["n_tokens"]
    make_data(source, tmp_path / "out", 8, 64, 2)
    assert (tmp_path / "out.bin").read_bytes() == states[1]
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(("workers", "lines"), [(1, 400), (2, 2)])  # its answers fill the pipe; they wait for questions
def test_workers_end_silently_when_their_parent_is_killed(tmp_path, workers, lines):
    write_lines(tmp_path / "in.jsonl", ["some words " * 2000] * lines)
    parent = psutil.Popen([sys.executable, "-c", HELD, str(workers)], cwd=tmp_path,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout.readline() == b"go\n"
    children = parent.children()
    assert len(children) == workers
    parent.kill()
    assert psutil.wait_procs([parent, *children], timeout=60)[1] == []
    assert parent.stderr.read() == b""


HELD = """
import sys, time
from rwkv_nb.data import make_data as m

def collect(path, batches, *rest):  # a worker has answered once; then nobody reads any more
    next(batches)
    time.sleep(0.5)
    print("go", flush=True)
    time.sleep(60)

m.LARGE, m._collect = 1, collect
m.make_data("in.jsonl", "out", 1, 1, 0, workers=int(sys.argv[1]))
"""
