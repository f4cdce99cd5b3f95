"""The strategy string of the `rwkv` package: which layer lives on which device, in which number format.

    parse_strategy("cuda fp16i8 *10 -> cuda:1 fp16 *8 -> cpu fp32", n_layer=32)

An entry is a device, a format and perhaps a count of layers; entries follow each other from first layer to last.
A model has n_layer + 1 places: its blocks, and the head with the norm before it.

    device    cpu, cuda, cuda:N, mps, dml
    format    fp32, fp16, bf16; with i8 the matrices are stored in 8 bits (fp16i8: computed in fp16). i4 and i3 may be
              written and change nothing
    *N        the next N places. Entries without a count share what is left, equally.
    *N+       the next N places stay on the device; all that are left are streamed through it from the computer's memory

What it is not: a count of bytes (`memory.py`), or a model. Differences from the package, which loads the same strings:
an error says what is wrong and where, and *0, on which it divides by zero, is refused.
Source: `rwkv/model.py` of the `rwkv` package, 0.8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEVICES = r"cpu|cuda(?::[0-9]+)?|mps|dml"
FORMATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as written -> torch's name


class StrategyError(ValueError):
    """A strategy that cannot be. reason: what is wrong; `text[at : at + length]`: where, marked in the message."""

    def __init__(self, reason: str, text: str = "", at: int = 0, length: int = 1):
        self.reason, self.text, self.at, self.length = reason, text, at, length
        shown = re.sub(r"\s", " ", text)  # a tab would shift what stands below it
        marker = f"{' ' * at}{'^' * max(1, length)} character {at + 1}"
        super().__init__(f"strategy: {reason}\n    {shown}\n    {marker}")


@dataclass(frozen=True)
class Entry:
    """One part of a strategy, as written. bits: i8, i4, i3 or nothing. count: None if not given. streams: has a +."""

    device: str
    format: str
    bits: str = ""
    count: int | None = None
    streams: bool = False

    def __str__(self) -> str:
        count = "" if self.count is None else f" *{self.count}" + "+" * self.streams
        return f"{self.device} {self.format}{self.bits}{count}"


@dataclass(frozen=True)
class Place:
    """Where one layer lives. index n_layer is the head. dtype: torch's name of what is computed in and, unless
    eight_bit, stored. streamed: its large matrices wait in the computer's memory and travel at every step."""

    index: int
    device: str
    dtype: str
    eight_bit: bool
    streamed: bool


@dataclass(frozen=True)
class Plan:
    """A strategy for a model of n_layer blocks: its entries, and a place for each block and for the head."""

    text: str
    n_layer: int
    entries: tuple[Entry, ...]
    places: tuple[Place, ...]
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices in use, in order of first use."""
        return tuple(dict.fromkeys(place.device for place in self.places))


def parse_strategy(text: str, n_layer: int) -> Plan:
    """Read a strategy and deal the places out.

    Raises:
        StrategyError: not a strategy; the message names the part, its position and what could stand there.
        ValueError: not a text, or n_layer is not at least 1.
    """
    if not isinstance(n_layer, int) or n_layer < 1:
        raise ValueError(f"parse_strategy: n_layer = {n_layer!r} must be a whole number of at least 1")
    if not isinstance(text, str):
        raise ValueError(f"strategy {text!r}: expected a text such as 'cuda fp16' or 'cpu fp32'")
    entries, start = [], 0
    for part in text.split("->"):
        entries.append(_entry(text, part, start))
        start += len(part) + 2
    counts, n_streamed, notes = _deal(entries, n_layer + 1)
    places: list[Place] = []
    for i, (entry, count) in enumerate(zip(entries, counts, strict=True)):
        stays = count - (n_streamed if i == _streaming(entries) else 0)
        for n in range(count):
            places.append(Place(len(places), entry.device, FORMATS[entry.format], entry.bits == "i8", n >= stays))
    return Plan(" -> ".join(map(str, entries)), n_layer, tuple(entries), tuple(places), tuple(notes))


def _entry(text: str, part: str, start: int) -> Entry:
    """One entry; `start` is where `part` begins in `text`."""
    words = [(m.group(), start + m.start()) for m in re.finditer(r"\S+", part)]
    if not words:
        raise StrategyError("an entry is empty; write a device and a format, such as 'cpu fp32'", text, start)
    device, at = words[0]
    if not re.fullmatch(DEVICES, device):
        raise StrategyError(
            f"{device!r} is no device; use cpu, cuda, cuda:0, cuda:1, …, mps or dml", text, at, len(device)
        )
    if len(words) < 2:
        formats = ", ".join(FORMATS)
        raise StrategyError(f"a format is missing after {device}; use {formats}, or fp16i8", text, at + len(device))
    format, at = words[1]
    found = re.fullmatch(r"(fp32|fp16|bf16)(i8|i4|i3)?", format)
    if not found:
        allowed = "use fp32, fp16 or bf16, with i8 behind it for 8-bit matrices"
        raise StrategyError(f"{format!r} is no format; {allowed}", text, at, len(format))
    count, streams = None, False
    if len(words) > 2:
        word, at = words[2]
        number = re.fullmatch(r"\*0*([0-9]{1,12})(\+?)", word)
        if not number:
            wanted = "expected a count of layers such as *10 or *10+, or ->"
            raise StrategyError(f"{word!r}: {wanted}", text, at, len(word))
        count, streams = int(number[1]), number[2] == "+"
        if count == 0 and not streams:
            remedy = "leave the entry out, or write *0+ to stream all"
            raise StrategyError(f"*0 gives this entry nothing to do; {remedy}", text, at, len(word))
    if len(words) > 3:
        word, at = words[3]
        raise StrategyError(f"{word!r} is one word too many; entries are separated by ->", text, at, len(word))
    return Entry(device, found[1], found[2] or "", count, streams)


def _streaming(entries: list[Entry]) -> int | None:
    """Which entry streams: the last one with a +, as in the package."""
    return max((i for i, entry in enumerate(entries) if entry.streams), default=None)


def _deal(entries: list[Entry], n_places: int) -> tuple[list[int], int, list[str]]:
    """Places for each entry, how many of the streaming entry's are streamed, and what a user should know."""
    counts, left, notes = [0] * len(entries), n_places, []
    for device in dict.fromkeys(entry.device for entry in entries if entry.device in ("mps", "dml")):
        notes.append(f"{device}: users report wrong text, and less speed than with cpu; compare it with cpu fp32 first")
    for i, entry in enumerate(entries):  # what was asked for, as far as it goes
        if entry.bits in ("i4", "i3"):
            notes.append(f"{entry.bits} changes nothing: the `rwkv` package stores such matrices as {entry.format}")
        if entry.count is not None:
            counts[i] = min(entry.count, left)
            left -= counts[i]
            if counts[i] < entry.count:
                notes.append(f"entry {i + 1} ({entry}) gets {counts[i]} places: the model has {n_places} with its head")
    streaming, n_streamed = _streaming(entries), 0
    if streaming is not None:
        n_streamed, left = left, 0
        counts[streaming] += n_streamed
    else:
        free = [i for i, entry in enumerate(entries) if entry.count is None]
        for n, i in enumerate(free):  # equal shares, the remainder to the last ones
            counts[i] = left // (len(free) - n)
            left -= counts[i]
        if left:
            counts[-1] += left
            notes.append(f"fewer than the {n_places} places are named: the last entry takes {left} more")
    idle = [str(entry) for entry, count in zip(entries, counts, strict=True) if count == 0]
    if idle:
        notes.append(f"nothing is left for {', '.join(idle)}")
    return counts, n_streamed, notes
