"""`python -m rwkv_nb train`: the flags of the article's train.py, checked, then a run.

    python -m rwkv_nb train --data_file data/demo --data_type binidx --vocab_size 65536 --my_pile_stage 1 ...

It is: the command line that TrainConfig's fields make, and the order: flags, rules, files and machine, banner,
run. Until all checks have passed torch is not imported and nothing is written; then the exit code is 2, and every
mistake is listed at once. It is not: the rules (rules.py, preflight.py), nor the run (trainer.py).

Booleans are written as in Lightning 1.9: `--enable_progress_bar False`, alone it means True. Of Lightning's own Trainer
flags those that the official scripts use are fields of TrainConfig; the others are refused with what to use instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rwkv_nb.training.agreement import first_process
from rwkv_nb.training.config import ConfigError, TrainConfig
from rwkv_nb.training.lightning_flags import REFUSED
from rwkv_nb.training.preflight import examine
from rwkv_nb.training.rules import did_you_mean

PROGRAM = "python -m rwkv_nb train"
GROUPS = {
    "run": "the run", "data": "data", "epochs": "mini-epochs and the end", "batch": "batch", "model": "model",
    "optimizer": "learning rate and optimizer", "machine": "devices, precision, memory",
}  # fmt: skip
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
TRUE, FALSE = ("true", "yes", "y", "t", "on", "1"), ("false", "no", "n", "f", "off", "0")
WHOLE = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "text"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigError: main prints them with the others."""

    def error(self, message: str) -> None:
        raise ConfigError([message])


def parser() -> Parser:
    """One option for each field of TrainConfig, in its groups. All values are strings, converted by `read_flags`."""
    made = Parser(
        PROGRAM, usage=f"{PROGRAM} [--FLAG VALUE ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.RawTextHelpFormatter(prog, max_help_position=34, width=200),
        description="Train RWKV-5 with the flags of the official train.py. The default follows each explanation.",
        epilog="Every mistake is named before anything is written. Example: scripts/demo-training-run.sh",
    )  # fmt: skip
    names = list(dict.fromkeys([*GROUPS, *(f.metadata["group"] for f in FIELDS.values())]))
    groups = {name: made.add_argument_group(GROUPS.get(name, name)) for name in names}
    for name, f in FIELDS.items():
        text = f"{f.metadata['help']} ({f.default!r})".replace("%", "%%")
        kind = {"nargs": "?", "const": "True"} if f.type == "bool" else {}
        groups[f.metadata["group"]].add_argument(f"--{name}", metavar=f.type.upper(), help=text, **kind)
    return made


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Flag -> value of its type, for the flags that are given. Raises ConfigError that lists what cannot be read."""
    known, rest = parser().parse_known_args(list(argv))
    problems = _unknown(rest)
    values: dict[str, Any] = {}
    for name, text in vars(known).items():
        kind = FIELDS[name].type
        if not isinstance(text, str):  # argparse makes a list of `--flag=--`
            problems.append(f"{name}='--': expected {WHOLE[kind]}")
            continue
        if name == "logger" and text.lower() in ("false", "true"):  # as Lightning 1.9 has it
            text = "none" if text.lower() == "false" else "csv"
        try:
            values[name] = {"int": int, "float": float, "bool": _boolean, "str": str}[kind](text)
        except ValueError:
            problems.append(f"{name}={text!r}: expected {WHOLE[kind]}")
    if problems:
        raise ConfigError(problems)
    return values


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError
    return text.lower() in TRUE


def _unknown(words: list[str]) -> list[str]:
    """A line for each flag that is none; a value that follows one is not a mistake of its own."""
    problems, after_flag = [], False
    for word in words:
        if not word.startswith("-"):
            if not after_flag:
                problems.append(f"{word!r} belongs to no flag")
            continue
        name, after_flag = word.split("=")[0].lstrip("-"), True
        if name in REFUSED:
            problems.append(f"--{name}: {REFUSED[name]}")
            continue
        close = did_you_mean(name.replace("-", "_"), FIELDS).replace("mean ", "mean --")
        problems.append(f"--{name}: no such flag{close or '; see --help'}")
    return problems


def check(argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """(the run that the command line asks for, notes), or ConfigError with every mistake. Imports no torch."""
    values = read_flags(argv)
    problems: list[str] = []
    try:
        rough = TrainConfig(**values)
    except ConfigError:  # a batch size that divides no mini-epoch; with one that does, the data can be looked at
        rough = TrainConfig(**{**values, "micro_bsz": 1, "devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1})
    found = examine(rough)
    try:
        cfg = TrainConfig(**{**values, **found.changes})
        problems += cfg.problems()
    except ConfigError as error:
        problems += error.problems
    if found.problems:  # without the data there is no prime: one mistake, not two
        problems = [text for text in problems if not text.startswith("magic_prime=0:")]
    problems += found.problems
    if not problems and cfg.vocab_size > 0:
        try:
            cfg.model_config()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return cfg, found.notes


def as_flag(problem: str) -> str:
    """A message of TrainConfig's, `name=value: ...`, in the words of the command line: `--name value: ...`."""
    match = re.match(r"(\w+)=('[^']*'|[^\s:]+)(?=[: ])", problem)
    if not match or match[1] not in FIELDS:
        return problem
    value = match[2].strip("'") or "''"
    return f"--{match[1]} {value}{problem[match.end():]}"


def slow_format(cfg: TrainConfig) -> str:
    """Advice where a processor has to imitate the number format of `cfg.precision`; "" elsewhere. Imports torch."""
    import torch

    from rwkv_nb.training.machine import fast_bf16

    on_cpu = cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not torch.cuda.is_available())
    if cfg.my_pile_stage == 1 or not on_cpu or cfg.precision not in ("bf16", "fp16"):
        return ""
    if fast_bf16("cpu"):
        return "" if cfg.precision == "bf16" else "precision: fp16 is for GPUs; this processor is made for bf16"
    return f"precision: this processor has no quick instructions for {cfg.precision}; fp32 should be faster"


def _show(message: Warning | str, *where: Any) -> None:
    """A warning as one line, without the place in the code that noticed it."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then train. Exit code 0 for a run that ended, 2 for flags or files that make it impossible.

    Raises Interrupted (exit code 130, 143, 138) after Ctrl-C, SIGTERM or SIGUSR1, when everything is saved.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        cfg, notes = check(argv)
    except ConfigError as error:
        lines = [f"{PROGRAM}: nothing was started or written", *(f"  {as_flag(text)}" for text in error.problems)]
        print("\n".join(lines), file=sys.stderr)
        return 2
    from rwkv_nb.training.banner import banner, parameter_table

    speaks = first_process(cfg)
    if speaks:
        print(banner(cfg), *(f"note: {note}" for note in notes), sep="\n", flush=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of packages, about packages
        warnings.showwarning = _show
        from pytorch_lightning.utilities.exceptions import MisconfigurationException

        from rwkv_nb.training.trainer import train

        if speaks and (note := slow_format(cfg)):
            print(f"note: {note}")
        if speaks and cfg.vocab_size > 0:
            print(parameter_table(cfg.model_config()), flush=True)
        try:
            train(cfg, progress=speaks, raise_interrupt=True)
        except MisconfigurationException as error:  # what only Lightning can tell: a device that it cannot use
            raise ValueError(f"Lightning refuses this run: {error}") from error
    if speaks:
        made = "rwkv-init.pth" if cfg.my_pile_stage == 1 else "rwkv-final.pth"
        print(f"written: {os.path.join(cfg.proj_dir, made)}")
    return 0
