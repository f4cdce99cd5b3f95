"""Pieces of kernel files carry their own line numbers, edits hit exactly one place, and drawings say what is true."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
import torch

from rwkv_nb.teaching import kernel_pictures, kernel_source, plots, roofline
from rwkv_nb.wkv import build, emulated

FILE = (build.kernels_folder() / emulated.SOURCE).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", sorted(emulated.pieces("\n".join(FILE))))
def test_a_piece_is_the_files_own_lines(name):
    piece = kernel_source.piece(name)
    assert piece.lines and all(FILE[number - 1].strip() == line.strip() for number, line in piece.lines)
    first = piece.lines[0][0]
    assert FILE[first - 2].strip() == f"// [{name}]"
    below = FILE[piece.lines[-1][0] :]
    rest = [line.strip() for line in below if line.strip()]
    assert not rest or rest[0].startswith("// [")


def test_a_piece_as_text_and_as_html_says_the_same():
    piece = kernel_source.piece("forward: read, then write the state")
    page = html.unescape(re.sub(r"<[^>]+>", "", piece._repr_html_()))
    for number, line in piece.lines:
        assert f"{number:>4}  {line}".rstrip() in page and f"{number:>4}  {line}".rstrip() in repr(piece)
    assert repr(piece) == repr(kernel_source.piece("forward: read, then write the state"))


def test_colours_stay_within_a_comment():
    shown = kernel_source.coloured("    for (int i = 0; i < n; i++) x[i] = 2.5f;  // for __syncthreads and 3 others")
    words = re.findall(r'<span style="([^"]+)">([^<]*)</span>', shown)
    assert [word for _, word in words][-1] == "// for __syncthreads and 3 others"
    assert {"for", "int", "0", "2.5f"} <= {word for _, word in words} and "&lt; n" in shown


def test_colours_can_be_read():
    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for style in kernel_source.STYLES.values():
        colour = re.search(r"color:(#\w+)", style).group(1)
        assert (luminance("#f4f6f8") + 0.05) / (luminance(colour) + 0.05) > 6, style


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"wkv5_cuda.cu has no marker \[forwards\]; it has: .*forward: one step"):
        kernel_source.piece("forwards")


def test_quote_and_edit():
    source = "a;\n  b;\n  c;\n"
    assert repr(kernel_source.quote(source, 3, 2, 2)) == "the lines\n   2  b;\n   3  c;"
    with pytest.raises(ValueError, match="lines 1 to 3, not 4"):
        kernel_source.quote(source, 4)
    assert kernel_source.edit("x x x", "x", "y", 2) == "x y x"
    with pytest.raises(ValueError, match="occurs 1 times"):
        kernel_source.edit(source, "b;", "", 2)
    with pytest.raises(ValueError, match="occurs 0 times"):
        kernel_source.edit(source, "d;", "")


def test_without_a_compiler_marked_cells_say_so_and_others_run(monkeypatch, capsys):
    reason = "needs a C++ compiler: 'install' one"
    marked = ["# by emulation\n", "1 / 0\n"]
    exec("".join(kernel_source.skip_cells(marked, reason)), {})
    assert capsys.readouterr().out == "not run: the emulator needs a C++ compiler\n"
    for cell in (["x = 1\n"], ["x = 1\n", "# by emulation\n"], []):
        assert kernel_source.skip_cells(cell, reason) == cell

    class Shell:
        input_transformers_cleanup: list = []

    monkeypatch.setattr(emulated, "why_not", lambda: reason)
    monkeypatch.setattr(kernel_source, "get_ipython", Shell)
    assert kernel_source.start_emulation() is False
    assert reason in capsys.readouterr().out
    [transform] = Shell.input_transformers_cleanup
    assert transform(marked) != marked and transform(["x = 1\n"]) == ["x = 1\n"]
    monkeypatch.setattr(emulated, "why_not", lambda: None)
    assert kernel_source.start_emulation() is True and len(Shell.input_transformers_cleanup) == 1


def texts(fig) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_mapping_counts_blocks_as_the_kernel_does():
    B, H, N = 2, 3, 8
    shown = texts(kernel_pictures.mapping_figure(B, H, N))
    blocks = [int(t.split()[1]) for t in shown if re.fullmatch(r"block \d", t)]
    assert blocks == [b * H + h for b in range(B) for h in range(H)]
    [title] = [t for t in shown if "the state S" in t]
    block, b, h = (int(n) for n in re.findall(r"(?:block|b =|h =) (\d+)", title))
    assert block == b * H + h


def test_addresses_are_those_of_a_tensor():
    T, H, N, h = 3, 4, 8, 1
    fig = kernel_pictures.address_figure(T, H, N, b=0, h=h)
    marked = [p.get_x() for p in fig.axes[0].patches if p.get_facecolor()[:3] != (1, 1, 1) and p.get_width() == N]
    place = torch.arange(T * H * N).view(1, T, H, N)
    assert marked == place[0, :, h, 0].tolist()
    assert f"step = H N = {place.stride(1)}" in texts(fig)


def test_lanes_hold_what_the_header_says():
    numbers = np.array([int(t) for t in texts(kernel_pictures.fragment_figure())]).reshape(16, 8)
    for lane in range(32):  # the table in kernels/emulate.h: rows g, g, g + 8, g + 8; columns 2 q, 2 q + 1, twice
        g, q = lane // 4, lane % 4
        held = {(g, 2 * q), (g, 2 * q + 1), (g + 8, 2 * q), (g + 8, 2 * q + 1)}
        assert set(zip(*np.where(numbers == lane), strict=True)) == held


def test_figures_can_be_drawn_and_counted():
    assert sum("registers" in t for t in texts(kernel_pictures.gpu_figure(threads=6))) == 6
    left, right = kernel_pictures.barrier_figure().axes
    ends = [p.get_x() + p.get_width() for p in left.patches if "write" not in str(p)]
    assert len(left.lines) == 1 and len(right.lines) == 0 and max(ends) > left.lines[0].get_xdata()[0]
    chain = kernel_pictures.chain_figure(T=32, L=16)
    assert "32 steps" in texts(chain) and "2 chunks" in texts(chain) and texts(chain).count("S") == 2
    assert plots.png(chain).startswith(b"\x89PNG")


def test_the_roof_has_a_slope_and_a_top():
    roof = roofline.Roof("a GPU", 4e12, {"slow": 40e12, "fast": 400e12})
    assert roof.ridge("slow") == 10 and roof.ridge("fast") == 100
    assert roof.reachable(5.0, "slow") == 20e12 and roof.reachable(50.0, "slow") == 40e12
    fig = roofline.roofline_figure(roof, [("a", 5.0, "slow"), ("b", 50.0, "fast")])
    points = [line.get_data() for line in fig.axes[0].lines if line.get_marker() not in ("None", None)]
    assert [(x[0], y[0]) for x, y in points] == [(5.0, 20.0), (50.0, 200.0)]


@pytest.mark.skipif(build.find_nvcc() is None or build.find_cxx() is None, reason="no nvcc here")
def test_nvcc_says_what_a_kernel_takes():
    used = kernel_source.compile_for_gpu("wkv5_forward<32, float>")
    assert used["registers"] > 32 and used["spilled bytes"] == 0
    assert used["shared bytes"] == 5 * 32 * 4  # d, d_rest, bonus, r_t, k_t
    with pytest.raises(RuntimeError, match="no_such_kernel"):
        kernel_source.compile_for_gpu("no_such_kernel<32>")


def test_without_nvcc_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert kernel_source.compile_for_gpu("wkv5_forward<32, float>") is None


def test_a_signature_ends_with_its_brace():
    lines = kernel_source.signature("gradient of k: arguments").lines
    assert lines[0][1].startswith("wkv5_backward_k(") and lines[-1][1].endswith("{")
    assert all(not line.endswith("{") for _, line in lines[:-1])
