"""What a reader does with the panels, by keyboard, in JupyterLab itself; pictures of it go to test-artefacts/."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_tokens_follow_what_is_typed(run_notebook, screenshot):
    page = run_notebook("01_tokenizer")
    box = page.get_by_label("Your text")
    box.scroll_into_view_if_needed()
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("Hello <b>")
    panel = page.locator(".widget-vbox").filter(has=box).first
    panel.get_by_text("9 characters, 9 bytes, 4 tokens").wait_for()  # the last key has arrived
    assert "33155" in panel.text_content()  # "Hello" is token 33155 of the World vocabulary
    assert "␣<" in panel.text_content()  # "<b>" is shown, not obeyed as HTML
    screenshot(page, "01 tokens of typed text")


def test_the_walk_follows_the_numbers(run_notebook, screenshot):
    page = run_notebook("03_magic_prime")
    box = page.get_by_label("ctx_len", exact=False).first
    box.scroll_into_view_if_needed()
    panel = page.locator(".widget-vbox").filter(has=box).first
    before, picture = panel.text_content(), panel.locator("img").first.get_attribute("src")
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("256")
    page.keyboard.press("Tab")
    page.wait_for_function("([p, t]) => p.textContent !== t", arg=[panel.element_handle(), before])
    page.wait_for_function("([i, s]) => i.src !== s", arg=[panel.locator("img").first.element_handle(), picture])
    screenshot(page, "03 walk after a changed ctx_len")
