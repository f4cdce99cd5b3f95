"""A section of RESULTS.md is found by words of its title and ends where the next one begins."""

from __future__ import annotations

import re

from rwkv_nb.teaching import measured

TEXT = "# Measured\n\nIntro.\n\n## make_data: fast\n\nA 1.\n\n## WKV-5 on a GPU\n\n| a |\n|--|\n\n### Forward\n\nB 2.\n"


def test_section_by_words_of_its_title(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text(TEXT)
    assert measured.section("gpu", file=file).data == "#### WKV-5 on a GPU\n\n| a |\n|--|\n\n#### Forward\n\nB 2."
    assert measured.section("make_data", file=file).data == "#### make_data: fast\n\nA 1."
    assert measured.section("WKV", "CPU", file=file) is None
    assert measured.section("PU", file=file) is None, "a word, not a part of one"
    assert measured.section("gpu", file=tmp_path / "missing.md") is None


def test_every_section_of_the_real_file_can_be_shown():
    titles = re.findall(r"^## (.+)$", measured.RESULTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(titles) >= 3
    for title in titles:
        assert measured.section(*title.split()[:2]).data.startswith("#### ")


def test_rows_of_a_table(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text("## Speed on a GPU\n\nWords | here.\n\n"
                    "| shape | way | ms | ms |\n|--|--|--:|--:|\n| (1, 2) | a | 1.5 | 9 |\n"
                    "| | b | 2 | 8 |\n\n| other |\n|--|\n| 3 |\n")  # fmt: skip
    rows = measured.table("GPU", file=file)
    assert rows == [{"shape": "(1, 2)", "way": "a", "ms": "1.5"}, {"shape": "(1, 2)", "way": "b", "ms": "2"}]
    assert measured.table("CPU", file=file) == [] and measured.table("GPU", file=tmp_path / "missing.md") == []
