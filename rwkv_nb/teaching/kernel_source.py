"""Kernel files as a lesson shows them: a piece between two marker comments, with line numbers and coloured words.

    kernel_source.piece("forward: one step")          the lines below `// [forward: one step]` in kernels/wkv5_cuda.cu
    kernel_source.quote(source, 41, 44)               single lines, such as a race report names
    kernel_source.edit(source, old, new)              the text with one place changed
    kernel_source.compile_for_gpu("wkv5_forward<64, float>")     what nvcc makes of it

What it is not: a parser of C++ (words are coloured, nothing is understood), or the emulator (`rwkv_nb.wkv.emulator`).
"""

from __future__ import annotations

import html
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from IPython.core.getipython import get_ipython

from rwkv_nb.wkv import build, emulated

MARK = "# by emulation"  # first line of a cell that needs a C++ compiler
MARKER = re.compile(r"^[ \t]*// \[(.+)\][ \t]*$")
# One alternative a colour. What comes first wins, so that a word inside a comment stays part of the comment.
TOKENS = re.compile(
    r"(?P<comment>//.*)|(?P<directive>^[ \t]*\#.*)"
    r"|(?P<cuda>\b(?:__\w+__|__\w+|threadIdx|blockIdx|blockDim|gridDim|SHARED|Global|Shared|Pack|atomicAdd|mma_\w+)\b)"
    r"|(?P<word>\b(?:template|typename|const|constexpr|struct|for|if|else|while|return|void|float|int|int64_t|unsigned"
    r"|bool|auto|inline)\b)"
    r"|(?P<number>\b\d[\w.]*\b)"
)
# Black, or nearly, on a pale ground in every theme: each colour has a contrast of at least 6 to 1.
STYLES = {
    "comment": "color:#555;font-style:italic",
    "directive": "color:#6b2c91",
    "cuda": "color:#963400;font-weight:bold",
    "word": "color:#004f8a;font-weight:bold",
    "number": "color:#005f45",
}


@dataclass(frozen=True)
class Piece:
    """Numbered lines of a source. As text: a caption and the lines; as HTML the same in colours."""

    caption: str
    lines: tuple[tuple[int, str], ...]  # (number, text)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def __repr__(self) -> str:
        return "\n".join([self.caption, *(f"{number:>4}  {line}".rstrip() for number, line in self.lines)])

    def _repr_html_(self) -> str:
        rows = []
        for number, line in self.lines:
            gutter = f'<span style="color:#666;user-select:none">{number:>4}  </span>'
            rows.append(gutter + coloured(line))
        body = "\n".join(rows)
        return (
            '<div style="color:#000;background:#f4f6f8;border-left:4px solid #0072b2;padding:4px 8px">'
            f"<small>{html.escape(self.caption)}</small>"
            '<pre style="margin:4px 0 0;background:transparent;color:#000;line-height:1.35;font-family:monospace;'
            f'font-size:12.5px;white-space:pre;overflow-x:auto">{body}</pre></div>'
        )


def coloured(line: str) -> str:
    """One line of C++ as HTML."""
    parts, end = [], 0
    for match in TOKENS.finditer(line):
        parts.append(html.escape(line[end : match.start()]))
        parts.append(f'<span style="{STYLES[match.lastgroup]}">{html.escape(match.group())}</span>')
        end = match.end()
    return "".join(parts) + html.escape(line[end:])


def _dedent(lines: list[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    while lines and not lines[-1][1].strip():
        lines = lines[:-1]
    margin = min((len(line) - len(line.lstrip()) for _, line in lines if line.strip() and line[0] != "#"), default=0)
    return tuple((number, line if line.startswith("#") else line[margin:]) for number, line in lines)


def piece(name: str, file: str = emulated.SOURCE) -> Piece:
    """The lines below the marker comment `// [name]` of a kernel file, up to the next marker.

    Raises ValueError if the file has no such marker, and names those that it has.
    """
    pieces: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(emulated.read_source(file).splitlines(), start=1):
        if marker := MARKER.match(line):
            lines = pieces.setdefault(marker.group(1), [])
        else:
            lines.append((number, line))
    pieces.pop("end", None)
    if name not in pieces:
        raise ValueError(f"kernels/{file} has no marker [{name}]; it has: {'; '.join(pieces)}")
    found = _dedent(pieces[name])
    return Piece(f"kernels/{file}, lines {found[0][0]} to {found[-1][0]}: {name}", found)


def signature(name: str, file: str = emulated.SOURCE) -> Piece:
    """The head of the kernel in a piece: from its name to the brace that opens it."""
    lines = piece(name, file).lines
    first = next(i for i, (_, line) in enumerate(lines) if re.match(r"\w+\(", line.strip()))
    last = next(i for i, (_, line) in enumerate(lines) if line.endswith("{"))
    return Piece(f"kernels/{file}, {name}", lines[first : last + 1])


def quote(source: str, *numbers: int, caption: str = "the lines") -> Piece:
    """Single lines of a source, by their numbers from 1."""
    lines = source.splitlines()
    wrong = [n for n in numbers if not 1 <= n <= len(lines)]
    if wrong:
        raise ValueError(f"quote: the source has lines 1 to {len(lines)}, not {wrong[0]}")
    return Piece(caption, _dedent([(n, lines[n - 1]) for n in sorted(set(numbers))]))


def edit(source: str, old: str, new: str, which: int = 1) -> str:
    """The source with the `which`-th occurrence of `old` replaced. Raises ValueError if it is not there."""
    parts = source.split(old)
    if not 1 <= which < len(parts):
        raise ValueError(f"edit: {old!r} occurs {len(parts) - 1} times, so there is no number {which} to replace")
    return old.join(parts[:which]) + new + old.join(parts[which:])


def compile_for_gpu(instance: str, file: str = emulated.SOURCE, arch: str = "sm_90") -> dict[str, int] | None:
    """What nvcc makes of one instance of a kernel template, such as "wkv5_forward<64, float>"; None without it.

    Returns: registers of a thread, bytes of shared memory of a block, bytes of registers spilled to memory.
    Raises: RuntimeError with nvcc's words if the source does not compile.
    """
    nvcc = build.find_nvcc()
    if nvcc is None or build.find_cxx() is None:  # nvcc leaves part of the work to a C++ compiler
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "instance.cu"
        source.write_text(f'#include "{file}"\nauto instance = &{instance};\n', encoding="utf-8")
        options = ["-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-I{build.kernels_folder()}"]
        command = [nvcc, *options, str(source), "-o", str(Path(folder) / "instance.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = instance.split("<")[0]
    text = done.stdout + done.stderr
    about = re.search(rf"entry function '\w*{name}\w*'(.*?)(?:Compiling entry|\Z)", text, re.DOTALL)
    if done.returncode or not about:
        raise RuntimeError(f"nvcc says on {instance}:\n{text}")
    shared = re.search(r"(\d+) bytes smem", about.group(1))
    spills = re.findall(r"(\d+) bytes spill", about.group(1))
    return {
        "registers": int(re.search(r"Used (\d+) registers", about.group(1)).group(1)),
        "shared bytes": int(shared.group(1)) if shared else 0,
        "spilled bytes": sum(map(int, spills)),
    }


def skip_cells(lines: list[str], reason: str) -> list[str]:
    """What to run in place of a cell without a compiler: cells that begin with MARK say so, others run as they are."""
    if lines and lines[0].strip() == MARK:
        missing = reason.split(":")[0].split(" (")[0]  # the remedy was given once, by start_emulation
        return [f"print({f'not run: the emulator {missing}'!r})\n"]
    return lines


def start_emulation() -> bool:
    """Say whether kernels can be emulated here; if not, cells that begin with MARK will say so and do nothing."""
    reason = emulated.why_not()
    if reason is None:
        print(f"A C++ compiler is here: cells that begin with `{MARK}` run the kernels' own source.")
        return True
    print(f"The emulator {reason}. Cells that begin with `{MARK}` are skipped; all others run.")
    if shell := get_ipython():
        shell.input_transformers_cleanup.append(lambda lines: skip_cells(lines, reason))
    return False
