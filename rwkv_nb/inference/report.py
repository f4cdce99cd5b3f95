"""A plan in words: which layers where, bytes by device, whether they fit, tokens a second at most.

    print(report.text(memory_plan(parse_strategy("cuda fp16i8 *20 -> cpu fp32", 32), config), this_machine()))

What it is not: the arithmetic (`memory.py`). GB are 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from .memory import SPARE, Device, MemoryPlan, find_device
from .strategy import Place

PLACES = ("layers", "device", "format", "each", "together")
DEVICES = ("device", "weights", "state", "streamed a token", "has", "verdict")
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(n: float) -> str:
    """Bytes with three digits: size(15_040_000_000) == "15.0 GB"."""
    for unit, name in UNITS:
        if n >= 0.9995 * unit:
            value = n / unit
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {name}"
    return f"{n:.0f} B"


def place_rows(needed: MemoryPlan) -> list[tuple[str, str, str, str, str]]:
    """Neighbouring layers of one kind in a row: (layers, device, format, bytes of each, together)."""
    rows = [("embedding", "cpu", needed.plan.places[0].dtype, "", size(needed.embedding))]
    groups: list[list[int]] = []
    for i in range(len(needed.plan.places)):
        if groups and _kind(needed, i) == _kind(needed, groups[-1][0]) and i < needed.plan.n_layer:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        first, last, each = group[0], group[-1], needed.layers[group[0]]
        name = "head" if first == needed.plan.n_layer else f"{first}" if first == last else f"{first} to {last}"
        rows.append((name, *_kind(needed, first), size(each), size(each * len(group))))
    return rows


def device_rows(needed: MemoryPlan, machine: dict[str, Device] | None = None) -> list[tuple[str, ...]]:
    """(device, weights, state, streamed a token, memory, verdict); the last two are empty without a machine."""
    lacking = needed.lacking(machine) if machine else {}
    rows = []
    for name in needed.weights:
        device = find_device(machine or {}, name)
        has = size(device.memory) if device else "none" if machine else ""
        fits = f"lacks {size(lacking[name])}" if name in lacking else "fits" if machine else ""
        state, streamed = (size(n[name]) if name in n else "" for n in (needed.state, needed.streamed))
        rows.append((name, size(needed.weights[name]), state, streamed, has, fits))
    return rows


def verdict(needed: MemoryPlan, machine: dict[str, Device]) -> str:
    """One line: fits or not, and the speed if every device is there."""
    lacking = needed.lacking(machine)
    if any(find_device(machine, name) is None for name in needed.weights):
        names = [name for name in needed.weights if find_device(machine, name) is None]
        return f"does NOT fit: this machine has no {', '.join(names)}"
    speed = f"at most {speed_text(needed.tokens_per_second(machine))} tokens a second, by bandwidth"
    if lacking:
        return f"does NOT fit with {SPARE:.0%} to spare ({', '.join(lacking)}); if it did: {speed}"
    return f"fits, with {SPARE:.0%} to spare; {speed}"


def speed_text(speed: float) -> str:
    """Two digits are all that such an estimate deserves."""
    return f"{speed:.2g}" if speed < 10 else f"{speed:.0f}"


def text(needed: MemoryPlan, machine: dict[str, Device] | None = None) -> str:
    """Both tables, notes and the verdict, as lines of text."""
    lines = [f"strategy: {needed.plan.text}", "", *_table(PLACES, place_rows(needed)), ""]
    lines += _table(DEVICES, device_rows(needed, machine))
    lines += [f"note: {note}" for note in needed.plan.notes]
    return "\n".join([*lines, *([verdict(needed, machine)] if machine else [])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = [[row[i] for i in kept] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(kept))]
    return ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in table]  # fmt: skip


def _kind(needed: MemoryPlan, index: int) -> tuple[str, str]:
    place = needed.plan.places[index]
    return place.device, _format(place)


def _format(place: Place) -> str:
    return place.dtype + " in 8 bits" * place.eight_bit + ", streamed" * place.streamed
