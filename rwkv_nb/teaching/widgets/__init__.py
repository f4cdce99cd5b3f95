"""Panels to play with: one module a notebook, logic in plain functions, controls by `Panel`.

Rules: every control has a description and works by keyboard (a number box beside a slider); results go into HTML or
Image widgets (never an Output widget, whose text a test cannot see); a static table or figure stands beside the panel,
so that the page says the same without a kernel; no callback swallows an exception: `Panel.guard` shows it.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable

import ipywidgets


class Panel(ipywidgets.VBox):
    """A VBox with a short text form, which is what viewers without a kernel show."""

    still = "the cell below says the same without one"  # how the page goes on there

    def __init__(self, title: str, children: list):
        self.title = title
        self.error = ipywidgets.HTML("")
        super().__init__(children=[*children, self.error])

    def __repr__(self) -> str:
        return f"[{self.title}: needs a running kernel; {self.still}]"

    def guard(self, callback: Callable) -> Callable:
        """Wrap an observer so that its exception is shown in the panel instead of vanishing in a log."""

        @functools.wraps(callback)
        def guarded(*args):
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001  whatever it is, the reader must see it
                self.error.value = f"<pre>{html.escape(type(error).__name__)}: {html.escape(str(error))}</pre>"
            else:
                self.error.value = ""

        return guarded


def number_and_slider(description: str, value: int, low: int, high: int, step: int = 1) -> tuple:
    """A labelled number box and a slider that follow each other: the box carries the accessible name."""
    box = ipywidgets.BoundedIntText(value=value, min=low, max=high, step=step, description=description,
                                    style={"description_width": "initial"})
    slider = ipywidgets.IntSlider(value=value, min=low, max=high, step=step, readout=False)
    ipywidgets.link((box, "value"), (slider, "value"))  # in the kernel, so that code that sets .value sees both move
    return box, slider


def decimal_and_slider(description: str, value: float, low: float, high: float, step: float = 0.05) -> tuple:
    """The same for decimals."""
    box = ipywidgets.BoundedFloatText(value=value, min=low, max=high, step=step, description=description,
                                      style={"description_width": "initial"})
    slider = ipywidgets.FloatSlider(value=value, min=low, max=high, step=step, readout=False)
    rounded = (float, lambda moved: round(moved, 6))  # a browser makes 0.15000000000000002 of three steps of 0.05
    ipywidgets.link((box, "value"), (slider, "value"), transform=rounded)
    return box, slider


def close_all(widget: ipywidgets.Widget) -> None:
    """Close a widget, everything in it, and their layouts and styles: nothing of them is kept in the kernel."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    for part in ("layout", "style"):
        if isinstance(getattr(widget, part, None), ipywidgets.Widget):
            getattr(widget, part).close()
    ipywidgets.Widget.close(widget)
