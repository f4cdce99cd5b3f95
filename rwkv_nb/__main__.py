"""The one door for the command line: `python -m rwkv_nb COMMAND ...`.

Each command is `main(argv) -> exit code` of one module, which is imported only when it is called. Errors that a reader
can mend (ValueError, OSError) become one message on stderr and exit code 1; an unknown command gives 2, Ctrl-C 130.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

PROGRAM = "python -m rwkv_nb"
COMMANDS = {  # name: (module with main(argv), what it does)
    "doctor": ("rwkv_nb.teaching.doctor", "check this machine: packages, devices, memory, Jupyter"),
    "build_data": ("rwkv_nb.data.corpus", "build the course's own data from the files in data/"),
    "make_data": ("rwkv_nb.data.make_data", "turn a .jsonl file into tokens: IN.jsonl N_EPOCH CTX_LEN"),
    "train": ("rwkv_nb.training.cli", "train a model with the flags of the official train.py"),
    "generate": ("rwkv_nb.inference.cli", "write with a trained model, or talk to it (--chat)"),
    "download": ("rwkv_nb.data.download", "fetch minipile (3 GB) or eagle-7b (15 GB) from the hub"),
    "checks": ("rwkv_nb.teaching.exercises", "list the exercises; --report: and the wrong answers they reject"),
    "magic_prime": ("rwkv_nb.data.magic_prime", "print the prime of a data set: PREFIX CTX_LEN"),
}


def usage() -> str:
    """The table of commands."""
    width = max(map(len, COMMANDS))
    rows = (f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return "\n".join([f"usage: {PROGRAM} COMMAND ...", "", *rows, "", f"More on one: {PROGRAM} COMMAND --help"])


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. argv: without the program's name; default sys.argv[1:]. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.replace("-", "_").lower(), COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean `{PROGRAM} {close[0]}`?" if close else ""
        return _fail(f"{PROGRAM}: unknown command {name!r}{hint}\n\n{usage()}", 2)
    if empty := [word for word in rest if word.startswith("--") and word.endswith("=--")]:
        return _fail(f"{PROGRAM} {name}: {empty[0]}: '--' is no value", 2)  # argparse would make a list of it
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except KeyboardInterrupt as stop:  # a run that has saved itself knows why it ended
        return _fail(f"\n{str(stop) or 'interrupted'}", getattr(stop, "exit_code", 130))
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _fail(f"{PROGRAM} {name}: {error}", 1)
    except ModuleNotFoundError as error:
        return _fail(f"{PROGRAM} {name}: the module {error.name} is missing; run `make setup` or `pip install .`", 1)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character must not end the run
    sys.exit(main())
