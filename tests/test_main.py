"""The one door for the command line: table, suggestions, exit codes, readable errors."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from rwkv_nb import __main__ as door


def run(*args, cwd=None, **options):
    return subprocess.run([sys.executable, "-m", "rwkv_nb", *args], cwd=cwd, capture_output=True, text=True,
                          encoding="utf-8", check=False, **options)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_table_of_commands(argv, capsys):
    assert door.main(argv) == 0
    out = capsys.readouterr().out
    for name, (_, what) in door.COMMANDS.items():
        assert f"  {name} " in out and what in out


def test_every_command_is_there_and_has_help(capsys):
    for name, (module, _) in door.COMMANDS.items():
        assert callable(importlib.import_module(module).main)
        with pytest.raises(SystemExit) as caught:
            door.main([name, "--help"])
        assert caught.value.code == 0
        assert f"rwkv_nb {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "meant"), [("make-data", "make_data"), ("makedata", "make_data"),
                                              ("Doctor", "doctor"), ("buld_data", "build_data")])
def test_unknown_command_is_code_2_with_a_suggestion(typed, meant, capsys):
    assert door.main([typed]) == 2
    err = capsys.readouterr().err
    assert f"unknown command '{typed}'; did you mean `python -m rwkv_nb {meant}`?" in err and "doctor" in err


def test_unlike_anything_gives_no_suggestion(capsys):
    assert door.main(["zzzzzz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


class Command:
    """Stands in for a module: main raises or returns what it is told."""

    def __init__(self, outcome):
        self.outcome = outcome

    def main(self, argv):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(("outcome", "code", "message"), [
    (None, 0, ""), (0, 0, ""), (3, 3, ""),
    (ValueError("n_epoch is 0"), 1, "python -m rwkv_nb doctor: n_epoch is 0\n"),
    (FileNotFoundError(2, "No such file", "a.txt"), 1, "python -m rwkv_nb doctor: [Errno 2] No such file: 'a.txt'\n"),
    (ModuleNotFoundError("x", name="tqdm"), 1,
     "python -m rwkv_nb doctor: the module tqdm is missing; run `make setup` or `pip install .`\n"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n"),
])
def test_outcomes_become_exit_codes_and_one_message(outcome, code, message, monkeypatch, capsys):
    monkeypatch.setattr(door.importlib, "import_module", lambda name: Command(outcome))
    assert door.main(["doctor"]) == code
    assert capsys.readouterr() == ("", message)


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(door.importlib, "import_module", lambda name: Command(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        door.main(["doctor"])


def test_asking_for_help_imports_no_command():
    code = ("import sys; from rwkv_nb import __main__ as door; door.main([]); "
            "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', *[m for m, _ in door.COMMANDS.values()])))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_make_data_end_to_end(tmp_path):
    (tmp_path / "sub").mkdir()
    lines = [json.dumps({"text": f"文 {i}"}) for i in range(300)]
    (tmp_path / "sub" / "in.v2.jsonl").write_text("\n".join([*lines, "bad"]), encoding="utf-8")
    arguments = ["make_data", "sub/in.v2.jsonl", "3", "16", "--seed", "1"]
    stopped = run(*arguments, cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert stopped.stderr.startswith("python -m rwkv_nb make_data: sub/in.v2.jsonl, line 301: not JSON")
    assert stopped.stderr.count("\n") == 1 and "Traceback" not in stopped.stderr
    done = run(*arguments, "--on-error", "skip", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "文 " in done.stdout and "bad lines skipped: 1" in done.stdout
    assert "--data_file in.v2 --data_type binidx --vocab_size 65536\n" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.v2.bin", "in.v2.idx", "in.v2.meta.json", "sub"]
    named = run(*arguments, "--on-error", "skip", "--out", "sub/x", "--workers", "2", cwd=tmp_path)
    assert named.returncode == 0
    assert (tmp_path / "sub" / "x.bin").read_bytes() == (tmp_path / "in.v2.bin").read_bytes()


def test_make_data_with_wrong_arguments_is_code_2(tmp_path):
    wrong = run("make_data", "in.jsonl", "three", "16", cwd=tmp_path)
    assert wrong.returncode == 2 and "N_EPOCH: invalid int value: 'three'" in wrong.stderr


def test_output_that_the_terminal_cannot_show_does_not_end_the_run(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "文"}), encoding="utf-8")
    done = run("make_data", "in.jsonl", "1", "1", cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u6587" in done.stdout
