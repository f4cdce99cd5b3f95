"""A disk that becomes full and a folder that cannot be written to: a message that says so, and old files as they were.

On a small disk of its own in memory, as permission bits do not bind everybody. Without the right to mount one, skipped;
tests/training/test_training_files.py limits the size of a file instead, which everybody may.
"""

from __future__ import annotations

import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_nb import __main__ as door
from rwkv_nb.data import download as downloads
from rwkv_nb.data.binidx import MMapIndexedDataset, MMapIndexedDatasetBuilder
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.make_data import make_data
from rwkv_nb.teaching import doctor
from rwkv_nb.training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Disk:
    """One megabyte."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, n_bytes: int) -> None:
        """Fill it until about so much is free."""
        (self.path / "filler").unlink(missing_ok=True)
        free = shutil.disk_usage(self.path).free
        (self.path / "filler").write_bytes(bytes(max(0, free - n_bytes)))

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)

    def content(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.path.iterdir() if p.is_file() and p.name != "filler"}


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield Disk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def promise_room(monkeypatch) -> None:
    """The system says that there is room, and then there is none: another program was quicker."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**40))


def said(capsys, *argv) -> tuple[int, str]:
    code = door.main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps({"text": f"document {i} " + "some words " * 300}) for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return tmp_path / "in.jsonl"


def test_make_data_on_a_full_disk(disk, source, tmp_path, capsys, monkeypatch):
    (tmp_path / "small.jsonl").write_text('{"text": "the eagle"}\n')
    make_data(tmp_path / "small.jsonl", disk.path / "out", 1, 4, 0)
    before = disk.content()
    code, err = said(capsys, "make_data", source, 40, 4, "--out", disk.path / "out")
    assert code == 1 and "MB of disk are needed" in err and "--out" in err
    for free in (20_000, 500_000, 0):  # it becomes full while it reads, while it writes, at once
        disk.leave(free)
        with monkeypatch.context() as patch:
            promise_room(patch)
            code, err = said(capsys, "make_data", source, 40, 4, "--out", disk.path / "out")
        assert code == 1 and ("the disk became full; nothing was changed" in err or "No space left" in err), err
        assert str(disk.path) in err and disk.content() == before
        assert MMapIndexedDataset(disk.path / "out").n_tokens == len(before["out.bin"]) // 2


def test_the_builder_on_a_full_disk(disk):
    with MMapIndexedDatasetBuilder(disk.path / "pair") as builder:
        builder.add_item([1, 2, 3])
    before = disk.content()
    with pytest.raises(OSError, match="No space left"), MMapIndexedDatasetBuilder(disk.path / "pair") as builder:
        for _ in range(40):
            builder.add_item(np.zeros(30_000, np.uint16))
    assert disk.content() == before


def test_a_checkpoint_on_a_full_disk(disk):
    path = save_checkpoint({"a": torch.zeros(10)}, disk.path / "rwkv-1.pth", "fp32")
    before = disk.content()
    with pytest.raises(OSError, match=r"rwkv-1\.pth: not written, there is no room .*needs about 4\.2 MB, 1\.0 MB are"):
        save_checkpoint({"a": torch.zeros(MIB)}, path, "fp32")
    assert disk.content() == before


def test_vocab_json_on_a_full_disk(disk):
    letters = CharTokenizer("abc")
    letters.save(disk.path / "vocab.json")
    before = disk.content()
    disk.leave(0)
    with pytest.raises(OSError, match="No space left"):
        CharTokenizer(map(chr, range(0x4E00, 0x4E00 + 3000))).save(disk.path / "vocab.json")
    assert disk.content() == before


def test_training_on_a_full_disk(disk, tmp_path, capsys):
    """The first file fits, the state of the trainer does not; what was written stays, and the run says why it ended."""
    (tmp_path / "text.txt").write_text("the eagle writes cell by cell. " * 40)
    flags = {"proj_dir": disk.path / "run", "data_file": tmp_path / "text.txt", "accelerator": "cpu", "n_layer": 2,
             "precision": "fp32", "n_embd": 64, "head_size_a": 32, "ctx_len": 8, "micro_bsz": 2, "epoch_steps": 4,
             "epoch_count": 3, "my_exit_tokens": 192, "epoch_save": 1, "enable_progress_bar": False}  # fmt: skip
    code, err = said(capsys, "train", *(f"--{name}={value}" for name, value in flags.items()))
    assert code == 1 and "not written, there is no room (No space left on device)" in err and "make room" in err
    names = {path.name for path in (disk.path / "run").iterdir()}
    assert "rwkv-init.pth" in names and not [name for name in names if name.endswith(".tmp")]


@pytest.fixture
def hub(monkeypatch):
    """Two files, which come in small pieces."""
    from huggingface_hub import file_download

    files = {"minipile.idx": b"i" * 1000, "minipile.bin": b"b" * (2 * MIB)}

    def look_up(remotes):
        name = remotes[0].path.rsplit("/")[-1]
        return downloads.Found(name, len(files[name]), "")

    def http_get(url, file, *, resume_size=0, **_):
        for a in range(resume_size, len(files[url]), 10_000):
            file.write(files[url][a : a + 10_000])

    monkeypatch.setattr(downloads, "look_up", look_up)
    monkeypatch.setattr(file_download, "http_get", http_get)
    return files


def test_a_download_on_a_full_disk(disk, hub, capsys, monkeypatch, tmp_path):
    promise_room(monkeypatch)
    code, err = said(capsys, "download", "minipile", "--to", disk.path)
    assert code == 1 and "minipile.bin: No space left on device; call it again, it goes on with what is in" in err
    content = disk.content()
    assert content.keys() == {"minipile.idx", "minipile.bin.part"} and content["minipile.idx"] == hub["minipile.idx"]
    assert 0 < len(content["minipile.bin.part"]) < 2 * MIB and not content["minipile.bin.part"].strip(b"b")
    shutil.copytree(disk.path, tmp_path / "larger")
    assert said(capsys, "download", "minipile", "--to", tmp_path / "larger")[0] == 0
    assert (tmp_path / "larger" / "minipile.bin").read_bytes() == hub["minipile.bin"]


def test_read_only(disk, hub, capsys, monkeypatch, tmp_path, source):
    promise_room(monkeypatch)
    with MMapIndexedDatasetBuilder(disk.path / "out") as builder:
        builder.add_item([1, 2, 3])
    before = disk.content()
    disk.read_only()
    (tmp_path / "text.txt").write_text("the eagle writes cell by cell. " * 40)
    train = ["--data_file", tmp_path / "text.txt", "--accelerator", "cpu", "--proj_dir", disk.path / "run"]
    for code, words, argv in (
        (1, "Read-only file system", ["make_data", source, 1, 4, "--out", disk.path / "out"]),
        (2, f"--proj_dir {disk.path / 'run'}: {disk.path} may not be written to", ["train", *train]),
        (1, "Read-only file system", ["download", "minipile", "--to", disk.path]),
    ):
        found, err = said(capsys, *argv)
        assert found == code and words in err and str(disk.path) in err, err
    with pytest.raises(OSError, match="Read-only file system"):
        save_checkpoint({"a": torch.zeros(10)}, disk.path / "rwkv-1.pth")
    assert disk.content() == before and MMapIndexedDataset(disk.path / "out").n_tokens == 3


def test_the_doctor_on_a_full_and_on_a_read_only_disk(disk):
    disk.leave(0)
    found = {f.part: f for f in doctor.check_machine(disk.path)}
    assert found["free disk"].status == "fail" and "make room" in found["free disk"].remedy
    disk.read_only()
    found = {f.part: f for f in doctor.check_machine(disk.path)}
    assert found["write permission"].status == "fail" and "Read-only" in found["write permission"].detail


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_the_set_up(disk, how):
    (disk.path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup_env.py", disk.path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        (disk.path / name).write_text("")
    disk.read_only() if how == "read-only" else disk.leave(100_000)
    done = subprocess.run([sys.executable, str(disk.path / "scripts" / "setup_env.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-1500:]
    assert "Set-up stopped: " in done.stderr and "call the same command again" in done.stderr
    assert ("Read-only file system" if how == "read-only" else "disk space?") in done.stderr
    assert not (disk.path / ".venv" / "pins.sha256").exists()
