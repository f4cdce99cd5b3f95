"""The strategy planner of notebook 09 in JupyterLab, by keyboard; pictures of it go to test-artefacts/."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_bars_follow_the_strategy(run_notebook, screenshot):
    page = run_notebook("09_eagle_7b", seconds=400)
    box = page.get_by_label("strategy", exact=True)
    panel = page.locator(".widget-vbox").filter(has=box).first
    picture = panel.locator("img").first
    picture.scroll_into_view_if_needed()

    def look(name: str) -> None:
        picture.evaluate("image => image.scrollIntoView({block: 'end'})")
        screenshot(page, name)

    def enter(label: str, text: str) -> None:
        panel.get_by_label(label, exact=True).first.focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(text)
        page.keyboard.press("Tab")

    def changed(before: str) -> str:
        page.wait_for_function("([i, s]) => i.src !== s", arg=[picture.element_handle(), before])
        return picture.get_attribute("src")

    panel.get_by_text("fits, with 10% to spare; at most 70 tokens a second", exact=False).wait_for()
    src = picture.get_attribute("src")
    enter("cuda GB", "8")
    panel.get_by_text("does NOT fit with 10% to spare (cuda)", exact=False).wait_for()
    assert panel.get_by_label("machine", exact=True).input_value() == "as typed below"
    src = changed(src)
    look("09 a strategy that does not fit")

    enter("strategy", "cuda fp16i8 *20 -> cpu fp17")
    panel.get_by_text("character 24: 'fp17' is no format", exact=False).wait_for()
    panel.locator("mark", has_text="fp17").wait_for()
    look("09 a mistake in a strategy")

    enter("strategy", "cuda fp16i8 *20 -> cpu fp32")
    panel.get_by_text("0 to 19", exact=True).wait_for()
    assert panel.locator("mark").count() == 0
    src = changed(src)
    rows = [[text.strip() for text in row.locator("th, td").all_text_contents()] for row in panel.locator("tr").all()]
    assert ["cpu", "12.1 GB", "13.0 MB", "", "64.0 GB", "fits"] in rows, rows
    look("09 twenty layers on a card of 8 GB")

    panel.get_by_role("button", name="best strategy for this memory").focus()
    page.keyboard.press("Enter")
    panel.get_by_text("0 to 30", exact=True).wait_for()
    assert box.input_value() == "cuda fp16i8 *31+"
    changed(src)
    look("09 the best strategy for it")
