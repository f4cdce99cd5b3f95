"""The tokenizer beside us: batches of texts go to processes of their own, ids come back in the same order.

    with Encoders(tokenizer, 1) as encoders:
        for job, encoded in encoders.map((number, texts) for ...):

Reading, parsing and checking then go on while another process tokenises: the Rust tokenizer holds Python's lock, so
that a thread would not help. A process is a plain `python -c`, fed through its stdin: unlike multiprocessing it never
imports the caller's script again (which would need the guard `if __name__ == "__main__":`), and it ends by itself when
its parent does, even by SIGKILL, since its stdin ends.

What it is not: a general pool. Source: none; pickle over pipes, between a process and its own child only.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AHEAD = 16  # batches under way for each process
PIPE = 1 << 20  # bytes a pipe shall hold: answers wait there while we do something else
PROGRAM = ("import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
           "from rwkv_nb.data.encoders import serve; serve()")

Encoded = tuple[array, array]


def encode(tokenizer: object, texts: list[str]) -> Encoded:
    """(ids of all texts in a row, each followed by 0: array("I"); the length of each with its 0: array("i"))."""
    joined, sizes = array("I"), array("i")  # from a list of int, array("I") is twice as fast as numpy
    for ids in tokenizer.encode_batch(texts):
        joined.fromlist(ids)
        joined.append(0)
        sizes.append(len(ids) + 1)
    return joined, sizes


class Encoders:
    """`count` processes that tokenise, from `with` on; 0: none, everything happens here.

    Each holds its own tokenizer, 260 MB for the World vocabulary in Rust; if there are several, each encodes with one
    thread. Raises ValueError for a tokenizer that cannot be pickled.
    """

    def __init__(self, tokenizer: object, count: int):
        self._tokenizer, self._count = tokenizer, count
        self._processes: list[_Process] = []
        try:
            self._packed = pickle.dumps(tokenizer) if count else b""
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(f"the tokenizer cannot be sent to processes ({error}); use workers=1") from error

    def map(self, jobs: Iterable[tuple[object, list[str]]]) -> Iterator[tuple[object, Encoded]]:
        """For each (job, texts) in turn (job, encoded). Raises what the tokenizer raised, ChildProcessError if a
        process died."""
        if not self._processes:
            for job, texts in jobs:
                yield job, encode(self._tokenizer, texts)
            return
        waiting: deque = deque()
        for number, (job, texts) in enumerate(jobs):
            process = self._processes[number % len(self._processes)]
            process.send(texts)
            waiting.append((job, process))
            if len(waiting) >= AHEAD * len(self._processes):
                job, process = waiting.popleft()
                yield job, process.receive()
        for job, process in waiting:
            yield job, process.receive()

    def __enter__(self) -> Encoders:
        try:
            for _ in range(self._count):
                self._processes.append(_Process(self._packed, single=self._count > 1))
        except OSError:  # no memory for the second: end the first
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()
        self._processes = []


class _Process:
    """One child. A thread feeds it, so that it can write its answers while we still write the next question."""

    def __init__(self, packed: bytes, single: bool):
        environment = {**os.environ, "RAYON_NUM_THREADS": "1"} if single else None  # Rayon: Rust's threads
        self._child = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM], env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for pipe in (self._child.stdin, self._child.stdout):
            with suppress(AttributeError, OSError):  # not everywhere, not for everybody: then answers wait a little
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
        self._questions: queue.SimpleQueue = queue.SimpleQueue()
        self._questions.put(pickle.dumps([entry or os.getcwd() for entry in sys.path]))
        self._questions.put(pickle.dumps(packed))  # twice, so that trouble with it leaves the stream in order
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def _feed(self) -> None:
        with suppress(OSError):  # the child is gone: `receive` will say so
            while (message := self._questions.get()) is not None:
                self._child.stdin.write(message)
                self._child.stdin.flush()

    def send(self, texts: list[str]) -> None:
        self._questions.put(pickle.dumps(texts, pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Encoded:
        try:
            answer = pickle.load(self._child.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._child.wait()
            raise ChildProcessError(f"a worker process died (exit code {code}: killed, or out of memory?); "
                                    "free some memory, or use fewer workers if there are several") from None
        if isinstance(answer, BaseException):
            raise answer
        ids, sizes = answer
        return array("I", ids), array("i", sizes)

    def close(self) -> None:
        """End the child at once: it holds nothing that could be lost."""
        self._child.kill()
        self._child.wait()
        self._questions.put(None)
        self._feeder.join()
        self._child.stdout.close()
        with suppress(OSError):  # what was left in the buffer has no reader any more
            self._child.stdin.close()


def serve() -> None:
    """The child: stdin has a pickled tokenizer (as bytes), then lists of texts; stdout gets ids and sizes for each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends us
    answers = os.dup(1)
    os.dup2(2, 1)  # what anybody prints goes to stderr, not between the answers
    packed, tokenizer, trouble = pickle.load(sys.stdin.buffer), None, None
    try:
        tokenizer = pickle.loads(packed)
    except Exception as error:  # noqa: BLE001  its class may be anybody's
        trouble = ValueError(f"the tokenizer arrived in a worker process, but cannot be used there ({error}); put its "
                             "class into a module of its own, or use workers=1")
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):  # the parent is gone, perhaps in the middle of a message
            return
        try:
            answer = trouble or tuple(part.tobytes() for part in encode(tokenizer, texts))
        except Exception as error:  # noqa: BLE001  whatever it is, the parent raises it
            answer = error
        try:
            _write(answers, _packed(answer))
        except BrokenPipeError:  # the parent is gone
            return


def _packed(answer: object) -> bytes:
    """The answer for the pipe. An exception that would not survive the journey becomes one that does."""
    try:
        data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
        if isinstance(answer, Exception):
            pickle.loads(data)
        return data
    except Exception:  # noqa: BLE001  what exceptions do when they are pickled is up to their authors
        return pickle.dumps(RuntimeError(f"{type(answer).__name__} in a worker process: {answer}"))


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
