"""The sizes panel of notebook 06 in JupyterLab, by keyboard; pictures of it go to test-artefacts/."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_the_counts_follow_the_sizes(run_notebook, screenshot):
    page = run_notebook("06_model", seconds=400)
    panel = page.locator(".widget-vbox").filter(has=page.get_by_label("World model")).first
    panel.scroll_into_view_if_needed()
    panel.get_by_text("192,807,936").wait_for()
    picture = panel.locator("img").first
    before = picture.get_attribute("src")

    def enter(label: str, text: str) -> None:
        panel.get_by_label(label, exact=False).first.focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(text)
        page.keyboard.press("Tab")

    enter("layers L", "24")
    enter("width D", "1024")
    panel.get_by_text("461,721,600").wait_for()
    assert panel.get_by_label("World model").input_value() == "0.4B"
    page.wait_for_function("([i, s]) => i.src !== s", arg=[picture.element_handle(), before])
    screenshot(page, "06 sizes of the 0.4B model")
    enter("width D", "100")
    panel.get_by_text("must be a multiple of 32", exact=False).wait_for()
    panel.get_by_label("World model").select_option("7B")
    panel.get_by_text("7,518,044,160").wait_for()
    screenshot(page, "06 sizes of Eagle 7B")
