"""What surrounds a run: Lightning kept quiet, and signals that end it after the step at hand: Ctrl-C and SIGTERM, and
SIGUSR1 and SIGUSR2, by which Slurm announces the end of a job (`sbatch --signal=USR1@300`).

It is: two context managers. It is not: the run itself (trainer.py), nor what is saved at its end (runbook.py).
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within: Lightning says nothing that is not an error (devices found, tips, advice on workers and folders)."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\b")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class Interrupted(KeyboardInterrupt):
    """A run that ended early because it was asked to, with everything saved.

    `exit_code`: 128 and the number of the signal, as shells have it: 130 Ctrl-C, 143 SIGTERM, on Linux 138 SIGUSR1.
    """

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, 128 + number
        super().__init__(f"{signal.Signals(number).name}: the run has stopped after a step, and its files are saved")


ENDS = (signal.SIGINT, signal.SIGTERM)
ANNOUNCES = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))  # not on Windows


class Stop:
    """Whether this process was asked to end; RunBook obeys at the end of a step. `number`: of the signal, or None."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def take_over(self) -> None:
        """Be the one who hears (again: Lightning puts a handler of its own before ours).

        A program that has a use of its own for SIGUSR1 or 2, in Python, keeps it. Else Lightning finds ours there, and
        does not answer with a checkpoint of its own and a new job, as it would under Slurm.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's
        for number in (*ENDS, *ANNOUNCES):
            now = signal.getsignal(number)
            if number in ANNOUNCES and now is not signal.SIG_DFL:
                continue
            self._before.setdefault(number, signal.SIG_DFL if now is None else now)
            signal.signal(number, self._ask)

    def give_back(self) -> None:
        """Put the earlier handlers in place."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.number = self.number or number  # why the run ends; what comes while it saves changes nothing
        # the next one of its kind is immediate; but an announcement may come twice, from Slurm and from a script
        signal.signal(number, signal.SIG_IGN if number in ANNOUNCES else self._before[number])


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Within: a signal asks the run to end after its step; a second Ctrl-C or SIGTERM acts as it would without us.

    Lightning answers KeyboardInterrupt by leaving the program; here it stays a KeyboardInterrupt.
    """
    stop = Stop()
    stop.take_over()
    try:
        yield stop
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        stop.give_back()
