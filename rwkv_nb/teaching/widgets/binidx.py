"""Notebook 02: the bytes of an .idx/.bin pair with a name on each field, and drawings of items, windows, orders.

What it is not: a reader of data sets (rwkv_nb.data.binidx is); it dissects small files that are sound.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rwkv_nb.data.binidx_format import DTYPES, HEADER
from rwkv_nb.teaching import plots

PALE = ("#cfe3f5", "#fbdcc4", "#cdeee0", "#f4dcea", "#f9e6b8", "#e4e4e4")  # black text on each: contrast over 12 to 1
ROW = 16  # bytes a row


@dataclass(frozen=True)
class Field:
    """A run of bytes: name, first byte, number of bytes, meaning. kind: fields of one kind share a colour."""

    name: str
    start: int
    length: int
    value: object
    kind: int


def index_fields(idx: bytes) -> list[Field]:
    """The fields of a sound index file, in the order of the file."""
    magic, version, code, n_items, n_docs = HEADER.unpack_from(idx)
    fields = [Field("magic", 0, 9, magic, 0), Field("version", 9, 8, version, 1),
              Field("dtype", 17, 1, f"{code} = {np.dtype(DTYPES[code]).name}", 2),
              Field("N items", 18, 8, n_items, 3), Field("M bounds", 26, 8, n_docs, 4)]
    for name, count, width, kind in (("sizes", n_items, 4, 0), ("pointers", n_items, 8, 1), ("doc_idx", n_docs, 8, 2)):
        start = fields[-1].start + fields[-1].length
        for i in range(count):
            at = start + i * width
            fields.append(Field(f"{name}[{i}]", at, width, int.from_bytes(idx[at:at + width], "little", signed=True),
                                kind))
    return fields


def token_fields(data: bytes, sizes: Sequence[int], dtype: object = np.uint16) -> list[Field]:
    """The fields of a .bin file: one a token, coloured by item."""
    tokens, width = np.frombuffer(data, dtype), np.dtype(dtype).itemsize
    item = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return [Field(f"{item[i]}:{place[i]}", i * width, width, int(tokens[i]), int(item[i])) for i in range(len(tokens))]


class HexDump:
    """Bytes with a name under each field. As HTML: a grid, coloured; as text: one field a line."""

    def __init__(self, data: bytes, fields: Sequence[Field], caption: str):
        self.data, self.fields, self.caption = data, list(fields), caption

    def __repr__(self) -> str:
        lines = [f"{self.caption}, {len(self.data)} bytes", f"{'byte':>5}  {'content':<26}  {'field':<12}  value"]
        for field in self.fields:
            content = self.data[field.start:field.start + field.length].hex(" ")
            lines.append(f"{field.start:>5}  {content:<26}  {field.name:<12}  {field.value}")
        return "\n".join(lines)

    def rows(self) -> list[list[tuple[Field, int, int]]]:
        """Row by row the pieces (field, first byte, end) that lie in it; a field may run on into the next row."""
        rows: list[list[tuple[Field, int, int]]] = [[] for _ in range(-(-len(self.data) // ROW))]
        for field in self.fields:
            at, end = field.start, field.start + field.length
            while at < end:
                stop = min(end, (at // ROW + 1) * ROW)
                rows[at // ROW].append((field, at, stop))
                at = stop
        return rows

    def _repr_html_(self) -> str:
        cell = ("border:1px solid #444;padding:1px 4px;text-align:left;font-family:monospace;color:#000;"
                "white-space:nowrap")
        lines = []
        for number, row in enumerate(self.rows()):
            cells = [f'<th scope="row" style="{cell};background:#fff;font-weight:normal">{number * ROW}</th>']
            for field, at, stop in row:
                name = field.name if at == field.start else "…"
                meaning = html.escape(f"{field.name} = {field.value}", quote=True)
                cells.append(f'<td colspan="{stop - at}" title="{meaning}" style="{cell};background:'
                             f'{PALE[field.kind % len(PALE)]}">{self.data[at:stop].hex(" ")}<br>'
                             f"<small>{html.escape(name)}</small></td>")
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return ('<table style="border-collapse:collapse"><caption style="text-align:left">'
                f"{html.escape(self.caption)}, {len(self.data)} bytes; the first column counts bytes; "
                "hover over a field for its value</caption>"
                f"{''.join(lines)}</table>")


def dump_pair(prefix: str) -> tuple[HexDump, HexDump]:
    """Hex dumps of PREFIX.idx and PREFIX.bin."""
    with open(f"{prefix}.idx", "rb") as file:
        idx = file.read()
    with open(f"{prefix}.bin", "rb") as file:
        data = file.read()
    code, n_items = HEADER.unpack_from(idx)[2:4]
    sizes = np.frombuffer(idx, "<i4", n_items, HEADER.size)
    return (HexDump(idx, index_fields(idx), f"{prefix}.idx"),
            HexDump(data, token_fields(data, sizes, DTYPES[code]), f"{prefix}.bin"))


def pair_figure() -> Figure:
    """Index above, data below: sizes and pointers of three items, an arrow from each pointer to its item."""
    fig, ax = plots.figure(width=9, height=2.9)
    ax.set_axis_off()
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 10)

    def box(x: float, y: float, width: float, text: str, i: int, size: float = 9) -> None:
        ax.add_patch(Rectangle((x, y), width, 2, facecolor=PALE[i], edgecolor="black", linewidth=1))
        ax.text(x + width / 2, y + 1, text, ha="center", va="center", fontsize=size)

    ax.text(0, 8, ".idx", va="center", fontweight="bold")
    box(7, 7, 17, "header\n34 bytes", 5)
    for k in range(3):
        box(25 + 7 * k, 7, 7, f"size {k}", 0, 8)
        box(47 + 8 * k, 7, 8, f"pointer {k}", 1, 8)
    box(72, 7, 27, "doc_idx: bounds of documents", 2, 8)
    ax.text(0, 2, ".bin", va="center", fontweight="bold")
    starts, widths = (7, 27, 68), (20, 41, 31)
    for k, (start, width) in enumerate(zip(starts, widths, strict=True)):
        box(start, 1, width - 4, f"tokens of item {k}", k)
        box(start + width - 4, 1, 4, "0", 5)
        ax.annotate("", xy=(start + 0.4, 3.1), xytext=(51 + 8 * k, 6.9),
                    arrowprops={"arrowstyle": "->", "lw": 1.3, **plots.line(k)})
    return fig


PAIR_ALT = ("Two rows of boxes. The index: a header of 34 bytes, three sizes, three pointers, the document bounds. "
            "The data below: tokens of items 0, 1 and 2 back to back, each ending with token 0. "
            "An arrow leads from each pointer to the first token of its item.")


def windows_figure(sizes: Sequence[int], ctx_len: int, first: int, count: int) -> Figure:
    """Documents as a strip, and beneath it windows `first` to `first + count - 1` of ctx_len + 1 tokens."""
    ends = np.cumsum(sizes)
    low, high = first * ctx_len, (first + count) * ctx_len + 1
    fig, ax = plots.figure(width=9, height=1.6 + 0.28 * count)
    for i, end in enumerate(ends):
        start = end - sizes[i]
        if end > low and start < high:
            left, right = max(start, low), min(end, high)
            ax.add_patch(Rectangle((left, 0.2), right - left, 1.2, facecolor=PALE[i % 2], edgecolor="black",
                                   hatch="" if i % 2 else "//", linewidth=0.8))
            ax.text((left + right) / 2, 0.8, f"doc {i}", ha="center", va="center", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    for k in range(count):
        start = (first + k) * ctx_len
        inside = ends[(ends > start) & (ends < start + ctx_len + 1)]
        y = -0.5 - 0.9 * k
        ax.plot([start, start + ctx_len], [y, y], marker="|", markersize=8, linewidth=2.5,
                **(plots.line(1) if len(inside) else plots.line(0)))
        ax.plot(inside, np.full(len(inside), y), "kx", markersize=6)
    ax.set_xlim(low - 0.01 * (high - low), high + 0.01 * (high - low))
    ax.set_ylim(-0.9 * count - 0.2, 1.6)
    ax.set_yticks([-0.5 - 0.9 * k for k in range(count)], [f"window {first + k}" for k in range(count)], fontsize=8)
    ax.set_xlabel("token offset in .bin")
    ax.grid(False)
    return fig


def order_figure(orders: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Where each document stands in each epoch: a line a document, dark if early in the file, bright if late."""
    fig, ax = plots.figure(height=3.4)
    places = np.array([np.argsort(order) for order in orders])
    n = places.shape[1]
    for document in range(n):
        ax.plot(range(len(orders)), places[:, document], marker="o", markersize=3, linewidth=1.2,
                color=(0.85 * document / n,) * 3)
    ax.set_xticks(range(len(orders)), labels)
    ax.set_ylabel("place in the epoch")
    ax.invert_yaxis()
    return fig
