"""The tokenizer beside us: batches of texts go to processes of their own, ids come back in the same order.

    with Encoders(tokenizer, 2) as encoders:
        for job, encoded in encoders.map((number, texts) for ...):

Reading, parsing and checking then go on while another process tokenises. A process is a plain `python -c`, fed through
its stdin: unlike multiprocessing it never imports the caller's script again (which would need the guard
`if __name__ == "__main__":`), and it ends by itself when its parent does, even by SIGKILL, since its stdin ends.

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

AHEAD = 16  # batches under way for each process
PIPE = 1 << 20  # bytes a pipe holds, where that can be set (Linux): batches wait there, nobody waits for the other
PROGRAM = "from rwkv_nb.data.encoders import serve; serve()"

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
    """`count` processes that tokenise; 0: none, everything happens here.

    In one process the Rust tokenizer uses all cores, in each of several one thread. Raises ValueError for a tokenizer
    that cannot be pickled.
    """

    def __init__(self, tokenizer: object, count: int):
        self._tokenizer = tokenizer
        self._processes: list[_Process] = []
        if count == 0:
            return
        try:
            packed = pickle.dumps(tokenizer)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(f"the tokenizer cannot be sent to another process ({error}); use workers=1") from error
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if count > 1:
            environment["RAYON_NUM_THREADS"] = "1"
        self._processes = [_Process(packed, environment) for _ in range(count)]

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
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()


class _Process:
    """One child. A thread feeds it, so that it can write its answers while we still write the next question."""

    def __init__(self, packed: bytes, environment: dict[str, str]):
        self._child = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM], env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=PIPE)
        self._questions: queue.SimpleQueue = queue.SimpleQueue()
        self._questions.put(packed)
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
            raise ChildProcessError(f"a tokenizing process died (exit code {code}: killed, or out of memory?); "
                                    "free some memory, or use fewer workers") from None
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
    """The child: a pickled tokenizer on stdin, then lists of texts; for each, ids and sizes as bytes on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends us
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints goes to stderr, not between the answers
    tokenizer = pickle.load(sys.stdin.buffer)
    while True:
        try:
            texts = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = tuple(part.tobytes() for part in encode(tokenizer, texts))
        except Exception as error:  # noqa: BLE001  whatever it is, the parent raises it
            answer = error
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
