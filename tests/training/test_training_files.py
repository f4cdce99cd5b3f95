"""Files whole or not at all: every call of a save may fail or be the last one; a full disk; damage; leftovers."""

import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_nb.training import files
from rwkv_nb.training.files import CheckpointError, read_tensors, remove_orphans, size_of, write_tensors

OLD, NEW = {"a": torch.zeros(3)}, {"a": torch.arange(20_000.0), "b": [torch.ones(7, dtype=torch.bfloat16), 3, "x"]}


class Killed(BaseException):
    """As good as SIGKILL, if whoever catches it does nothing more."""


def calls_of_a_save(monkeypatch, path, at=None, error=None, dead=False):
    """Save NEW; the call number `at` fails with `error`, and if `dead` all later ones do. Names of the calls."""
    made = []

    def counted(name, function):
        def call(*args, **kwargs):
            made.append(name)
            if at is not None and (len(made) == at or (dead and len(made) > at)):
                raise error
            return function(*args, **kwargs)

        return call

    class Counted(io.FileIO):
        write = counted("write", io.FileIO.write)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", counted("open", lambda path, mode: Counted(path, mode)), raising=False)
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        patch.setattr(Path, "unlink", counted("unlink", Path.unlink))
        write_tensors(NEW, path)
    return made


def same(a, b):
    return torch.equal(a["a"], b["a"]) and a.keys() == b.keys()


def test_the_calls_come_in_the_safe_order(tmp_path, monkeypatch):
    calls = calls_of_a_save(monkeypatch, tmp_path / "rwkv-1.state")
    writes = calls.count("write")
    assert writes > 5 and calls == ["open", *["write"] * writes, "fsync", "replace", "fsync"]


def test_killed_between_any_two_calls(tmp_path, monkeypatch):
    calls = calls_of_a_save(monkeypatch, tmp_path / "rwkv-0.state")
    path = tmp_path / "rwkv-1.state"
    for at in range(1, len(calls) + 1):
        write_tensors(OLD, path)
        with pytest.raises((Killed, RuntimeError)):
            calls_of_a_save(monkeypatch, path, at, Killed(), dead=True)
        renamed = at == len(calls)
        assert same(read_tensors(path), NEW if renamed else OLD), calls[at - 1]
        left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        assert len(left) == (0 if at == 1 or renamed else 1), calls[at - 1]
        assert remove_orphans(tmp_path) == left
    assert sorted(os.listdir(tmp_path)) == ["rwkv-0.state", "rwkv-1.state"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_at_any_call(tmp_path, monkeypatch, number):
    calls = calls_of_a_save(monkeypatch, tmp_path / "rwkv-0.state")
    path = write_tensors(OLD, tmp_path / "rwkv-1.state")
    for at in range(1, len(calls)):
        with pytest.raises(OSError, match=r"1\.state: not written.*needs about 0\.1 MB, \d+\.\d MB are free") as found:
            calls_of_a_save(monkeypatch, path, at, OSError(number, "as full as can be"))
        assert found.value.errno == number, "torch's own words about it would be about a position"
        assert same(read_tensors(path), OLD) and len(os.listdir(tmp_path)) == 2, "the half file takes no room"


def test_another_error_stays_what_it_is(tmp_path, monkeypatch):
    with pytest.raises(PermissionError, match="not yours"):
        calls_of_a_save(monkeypatch, tmp_path / "x.pth", 3, PermissionError(errno.EACCES, "not yours"))
    with pytest.raises(KeyboardInterrupt):
        calls_of_a_save(monkeypatch, tmp_path / "x.pth", 1, KeyboardInterrupt())
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_disk_that_is_really_full(tmp_path):
    """The system refuses to let a file grow beyond 100,000 bytes."""
    path = write_tensors(OLD, tmp_path / "rwkv-3.pth")
    before = path.read_bytes()
    code = (
        "import resource, torch; from rwkv_nb.training.checkpoint import save_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"save_checkpoint({{'emb.weight': torch.zeros(300_000)}}, {str(path)!r}, 'fp32')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert "rwkv-3.pth: not written, there is no room (File too large): it needs about 1.2 MB" in done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["rwkv-3.pth"]


def test_a_flipped_bit_is_found(tmp_path):
    """torch.load alone reads on, and gives other numbers."""
    path = write_tensors(NEW, tmp_path / "rwkv-1.pth")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = next(entry.header_offset for entry in archive.infolist() if entry.filename.endswith("data/0"))
    content[offset + 30_000] ^= 1
    path.write_bytes(content)
    assert not same(torch.load(path, weights_only=True), NEW)
    with pytest.raises(CheckpointError, match=r"rwkv-1\.pth: damaged.*checksum"):
        read_tensors(path)


def test_what_is_read_is_what_was_written(tmp_path):
    again = read_tensors(write_tensors(NEW, tmp_path / "a" / "rwkv-1.state"))
    assert same(again, NEW) and torch.equal(again["b"][0], NEW["b"][0]) and again["b"][1:] == [3, "x"]
    assert size_of(NEW) == 80_000 + 14
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "nowhere")


def test_only_orphans_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    alive, mine = os.getppid(), os.getpid()
    orphans = [f".rwkv-3.pth.{gone.pid}.tmp", f".rwkv-3.20.state.{gone.pid}.tmp", f".rwkv-init.pth.{mine}.tmp",
               f"vocab.json.{gone.pid}.tmp"]  # fmt: skip
    others = [f".rwkv-3.pth.{alive}.tmp", "rwkv-3.pth", ".rwkv-3.pth.tmp", ".rwkv-x.txt.1.tmp", "notes.tmp"]
    for name in orphans + others:
        (tmp_path / name).touch()
    assert sorted(remove_orphans(tmp_path)) == sorted(orphans)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    os.utime(tmp_path / others[0], (0, 0))
    assert remove_orphans(tmp_path) == [others[0]], "a day old: its number belongs to another process by now"
    assert remove_orphans(tmp_path / "nowhere") == []
