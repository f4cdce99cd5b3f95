"""The self-check against a machine that works and against simulated faults."""

from __future__ import annotations

import collections
import functools
import shutil
from types import SimpleNamespace

import psutil
import pytest

from rwkv_nb.teaching import doctor
from rwkv_nb.wkv import cpu


def test_this_environment_is_sound(tmp_path):
    findings = doctor.examine(tmp_path)
    assert [str(f) for f in findings if f.status == "fail"] == []
    parts = {f.part for f in findings}
    assert {
        "Python",
        "torch",
        "jupyterlab",
        "torch device",
        "C++ compiler",
        "nvcc",
        "wkv5 operator",
        "GPU",
        "free memory",
        "free disk",
        "write permission",
        "Jupyter kernel",
        "widgets front end",
    } <= parts
    assert list(tmp_path.iterdir()) == []  # the write test leaves nothing


def test_an_old_package_is_named_with_its_bound(monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "1.0" if name == "numpy" else real(name))
    [finding] = [f for f in doctor.check_packages() if f.status == "fail"]
    assert finding.part == "numpy" and "1.0 is not" in finding.detail and "pip install" in finding.remedy


def test_a_missing_package_is_named(monkeypatch):
    def absent(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    findings = list(doctor.check_packages())
    assert len(findings) >= 10 and {f.detail for f in findings} == {"not installed"}


def test_optional_packages_are_no_failure(monkeypatch):
    def only_wandb(name):
        if name != "wandb":
            raise doctor.PackageNotFoundError(name)
        return "9.8.7"

    monkeypatch.setattr(doctor, "version", only_wandb)
    lines = {f.part: str(f) for f in doctor.check_extras()}
    assert lines["wandb"].startswith("[OK]") and "9.8.7, for --wandb" in lines["wandb"]
    for name in ("deepspeed", "tensorboard"):
        assert lines[name].startswith("[--]") and "pip install -e '.[gpu]'" in lines[name]


@pytest.mark.parametrize(("info", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")])
def test_python_range(monkeypatch, info, status):
    monkeypatch.setattr(doctor.sys, "version_info", (*info, 0))
    assert doctor.check_python().status == status


def test_little_memory_and_disk_fail_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**29))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 2**20))
    failed = {f.part: f.remedy for f in doctor.check_machine(tmp_path) if f.status == "fail"}
    assert set(failed) == {"free memory", "free disk"} and all(failed.values())


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    [finding] = [f for f in doctor.check_machine(tmp_path) if f.part == "write permission"]
    assert finding.status == "fail" and "Permission denied" in finding.detail


def test_no_compiler_is_not_a_failure(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(cpu, "_library", functools.cache(cpu._library.__wrapped__))  # as if nothing had been loaded yet
    compiler, nvcc, operator = doctor.check_compilers()
    assert compiler.status == nvcc.status == "absent" and "g++" in compiler.remedy
    assert operator.status == "ok" and operator.detail == "reference, chunked"


def test_exit_code_follows_the_findings(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda folder: [doctor.Finding("disk", "fail", "full", "make room")])
    assert doctor.main([]) == 1
    assert "[FAIL] disk" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda folder: [doctor.Finding("disk", "absent", "none")])
    assert doctor.main([]) == 0
