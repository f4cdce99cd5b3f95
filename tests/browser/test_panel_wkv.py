"""The state panel of notebook 04 in JupyterLab, by keyboard; pictures of it go to test-artefacts/."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_the_state_follows_the_letter_and_the_text(run_notebook, screenshot):
    page = run_notebook("04_wkv", seconds=240)
    panel = page.locator(".widget-vbox").filter(has=page.get_by_label("letters read")).first
    panel.scroll_into_view_if_needed()
    box = panel.get_by_label("letters read")
    picture = panel.locator("img").first
    before = picture.get_attribute("src")

    def enter(field, text: str) -> None:
        field.focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(text)
        page.keyboard.press("Tab")

    enter(box, "14")
    panel.get_by_text("guess: “e”, right").wait_for()  # "the rat ate th": after h came e
    page.wait_for_function("([i, s]) => i.src !== s", arg=[picture.element_handle(), before])
    assert panel.locator("mark").text_content() == "h"
    before = picture.get_attribute("src")
    enter(panel.get_by_label("half-life", exact=False).first, "3")
    page.wait_for_function("([i, s]) => i.src !== s", arg=[picture.element_handle(), before])
    panel.scroll_into_view_if_needed()
    screenshot(page, "04 state after 14 letters")
    enter(panel.get_by_label("Text").first, "<b>bold")
    page.wait_for_function("p => p.textContent.includes('<b>bold')", arg=panel.element_handle())  # shown, not obeyed
    panel.get_by_text("the text ends here").wait_for()
    page.wait_for_function("b => b.value === '7'", arg=box.element_handle())
    screenshot(page, "04 state of a typed text")


def test_the_trained_model_steps_with_the_arrow_key(run_notebook, screenshot):
    page = run_notebook("04_wkv", seconds=240)
    panel = page.locator(".widget-vbox").filter(has=page.get_by_label("letters read")).nth(1)
    panel.scroll_into_view_if_needed()
    box, slider = panel.get_by_label("letters read"), panel.get_by_role("slider").first
    before = panel.locator("img").first.get_attribute("src")
    slider.focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("b => b.value === '20'", arg=box.element_handle())
    panel.locator("mark", has_text="r").wait_for()  # "Long ago a shy squir"
    page.wait_for_function("([i, s]) => i.src !== s", arg=[panel.locator("img").first.element_handle(), before])
    panel.scroll_into_view_if_needed()
    screenshot(page, "04 trained state")
