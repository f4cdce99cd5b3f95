"""The sampling panel of notebook 08 in JupyterLab, by keyboard; pictures of it go to test-artefacts/."""

from __future__ import annotations

import re

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]


# Read as the page holds it, not as it is laid out: a cell that JupyterLab has just scrolled in has no innerText yet.
LEFT = """panel => [...panel.querySelectorAll('tr')]
    .filter(row => row.querySelector('th')?.textContent.trim() === 'tokens left')
    .flatMap(row => [...row.querySelectorAll('td')].map(cell => parseInt(cell.textContent)))"""


def left_when(page, panel, condition: str) -> list[int]:
    """How many tokens are left after each step, as soon as the table says something for which `condition` holds."""
    wait = f"panel => {{ const left = ({LEFT})(panel); return left.length === 5 && ({condition}) && left; }}"
    return page.wait_for_function(wait, arg=panel.element_handle()).json_value()


def test_the_chances_follow_the_knobs_and_a_text_is_written_and_stopped(run_notebook, screenshot):
    page = run_notebook("08_sampling", seconds=400)
    panel = page.locator(".widget-vbox").filter(has=page.get_by_label("prompt", exact=True)).first
    panel.scroll_into_view_if_needed()
    chances = panel.locator("table").first
    chances.wait_for()

    def enter(label: str, text: str) -> None:
        before = chances.inner_html()
        panel.get_by_label(label, exact=True).first.focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(text)
        page.keyboard.press("Tab")
        changed = "([t, b]) => !t.isConnected || t.innerHTML !== b"
        page.wait_for_function(changed, arg=[chances.element_handle(), before])

    start = left_when(page, panel, "left[0] === 96")
    assert start[1] == 96 and 1 < start[2] == start[3] == start[4] < 20  # top_p 0.85 cuts, no other knob
    chances.scroll_into_view_if_needed()  # figures above have come in meanwhile
    screenshot(page, "08 chances at the start")
    enter("top_p", "0.4")
    left_when(page, panel, f"left[2] >= 1 && left[2] < {start[2]}")
    enter("top_p", "1")
    left_when(page, panel, "left.every(n => n === 96)")
    likeliest = chances.locator("tr").nth(1).locator("td").last
    hot = likeliest.text_content()
    enter("temperature", "0.2")
    assert float(likeliest.text_content().split()[0]) > float(hot.split()[0])
    enter("temperature", "0")
    left_when(page, panel, "left[4] === 1")
    assert likeliest.text_content().strip() == "100.0 %"
    slider = panel.get_by_role("slider").first  # the temperature's: it follows the box, and the box follows it
    slider.focus()
    page.keyboard.press("ArrowRight")
    box = panel.get_by_label("temperature", exact=True).first
    page.wait_for_function("b => b.value === '0.05'", arg=box.element_handle())
    enter("temperature", "0.9")
    chances.scroll_into_view_if_needed()
    screenshot(page, "08 chances at temperature 0.9 and top_p 1")

    status = panel.get_by_role("status")
    enter_number(page, panel, "tokens at most", "60")
    press(page, panel, "Generate")
    status.filter(has_text=re.compile(r"^done: \d+ tokens")).wait_for()
    panel.get_by_text("Runs so far").wait_for()
    panel.get_by_text("top_p 1, seed 0").wait_for()
    assert panel.get_by_label("seed", exact=True).input_value() == "1"
    enter_number(page, panel, "tokens at most", "90000")
    stop_texts = panel.get_by_label("stop texts", exact=False).first
    stop_texts.focus()
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    press(page, panel, "Generate")
    status.filter(has_text="writing: ").wait_for()
    screenshot(page, "08 while it writes")
    press(page, panel, "Stop")
    status.filter(has_text="cancelled: ").wait_for()
    count = int(re.search(r"cancelled: ([\d,]+) tokens", status.text_content())[1].replace(",", ""))
    assert 0 < count < 90_000
    panel.get_by_text("top_p 1, seed 1").wait_for()
    panel.get_by_role("button", name="Generate").scroll_into_view_if_needed()
    screenshot(page, "08 two runs side by side")
    enter_number(page, panel, "token_ban (ids)", "x")
    panel.get_by_text("is no token id", exact=False).wait_for()  # what is wrong is shown


def enter_number(page, panel, label: str, text: str) -> None:
    panel.get_by_label(label, exact=True).first.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(text)
    page.keyboard.press("Tab")


def press(page, panel, name: str) -> None:
    panel.get_by_role("button", name=name, exact=True).focus()
    page.keyboard.press("Enter")
