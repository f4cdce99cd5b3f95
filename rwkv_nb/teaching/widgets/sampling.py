"""The sampling panel of notebook 08: a prompt, every knob, the next token's chances, and a text as it is written.

    panel("../data/small.pth", folder="../runs")

A Panel over the functions of `rwkv_nb.teaching.sampling_steps`. Knobs act on the chances at once; a text is written by
a thread of its own, with the knobs as they stood when it began. What it is not: a way to sample; that is
`rwkv_nb.inference`, for any engine that `load_engine` knows.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets
import torch

from rwkv_nb.inference.generation import Generation, generate
from rwkv_nb.inference.sampling import SamplingArgs
from rwkv_nb.teaching import sampling_steps as steps
from rwkv_nb.teaching.widgets import Panel, close_all, decimal_and_slider, number_and_slider

REDRAW = 0.15  # seconds between two pictures of a text that is being written
KEPT = 6  # runs in the history
QUICK = 10**7  # n_layer * n_embd^2 of a model that reads a prompt again at every key
WIDE = {"style": {"description_width": "initial"}}
START = SamplingArgs(alpha_frequency=0.0, alpha_presence=0.0)  # penalties are for tokens of whole words


class SamplingPanel(Panel):
    """The panel for the files of `choices`; `load(path, strategy)` gives an engine and its tokenizer.

    Controls by the names of PIPELINE_ARGS: temperature, top_p, top_k, alpha_frequency, alpha_presence, alpha_decay,
    token_ban, token_stop, chunk_len; also file, path, strategy, prompt, stop, n_tokens, seed, next_seed, and the
    buttons go, halt, forget. Results, all HTML: chances, text, status, history.
    """

    def __init__(self, choices: Sequence[str], prompt: str, start: SamplingArgs = START, load: Callable = steps.load):
        self._load, self._lock, self._thread = load, threading.RLock(), None
        self._generation: Generation | None = None
        self.runs: list[tuple[str, str, str]] = []  # settings, prompt, text
        self._make_controls(choices, prompt, start)
        self.chances, self.text, self.status, self.history = (ipywidgets.HTML() for _ in range(4))
        box = ipywidgets.HBox
        super().__init__("Sampling", [
            box([self.file, self.strategy]), self.path, self.prompt,
            *(box([*self._pairs[a], *self._pairs[b]]) for a, b in steps.PAIRS),
            box([self.token_ban, self.token_stop]), box([self.stop, self.chunk_len]),
            box([self.n_tokens, self.seed, self.next_seed]), box([self.go, self.halt, self.forget]),
            self.status, self.text, self.chances, self.history,
        ])  # fmt: skip
        for control in (self.file, self.path, self.strategy):
            control.observe(self.guard(self._open), names="value")
        self.prompt.observe(self.guard(self._read), names="value")
        for control in (*(pair[0] for pair in self._pairs.values()), self.token_ban):
            control.observe(self.guard(self._draw), names="value")
        self.go.on_click(self.guard(self._begin))
        self.halt.on_click(self.guard(self._halt))
        self.forget.on_click(self.guard(self._forget))
        self.guard(self._open)()

    def _make_controls(self, choices: Sequence[str], prompt: str, start: SamplingArgs) -> None:
        wide, half = ipywidgets.Layout(width="97%"), ipywidgets.Layout(width="48%")
        self.file = ipywidgets.Dropdown(options=list(choices), description="model", **WIDE)
        self.strategy = ipywidgets.Text(value="cpu fp32", description="strategy", continuous_update=False, **WIDE)
        self.path = ipywidgets.Text(description="or the path of a .pth", continuous_update=False, layout=wide, **WIDE)
        self.prompt = ipywidgets.Textarea(value=prompt, description="prompt", rows=2, layout=wide, **WIDE)
        self._pairs = {
            "temperature": decimal_and_slider("temperature", start.temperature, 0, 3),
            "top_p": decimal_and_slider("top_p", start.top_p, 0, 1),
            "top_k": number_and_slider("top_k (0: no limit)", start.top_k, 0, 100),
            "alpha_decay": decimal_and_slider("alpha_decay", start.alpha_decay, 0, 1, 0.001),
            "alpha_presence": decimal_and_slider("alpha_presence", start.alpha_presence, -1, 2),
            "alpha_frequency": decimal_and_slider("alpha_frequency", start.alpha_frequency, -1, 2),
        }
        for name, (number, _) in self._pairs.items():
            setattr(self, name, number)
        typed = {"continuous_update": False, "layout": half, **WIDE}
        self.token_ban = ipywidgets.Text(description="token_ban (ids)", **typed)
        self.token_stop = ipywidgets.Text(description="token_stop (ids)", **typed)
        self.stop = ipywidgets.Text(value=r"\n\n", description=r"stop texts, with | between (\n: new line)", **typed)
        self.chunk_len = ipywidgets.BoundedIntText(value=start.chunk_len, min=1, max=4096, description="chunk_len",
                                                   **WIDE)  # fmt: skip
        self.n_tokens = ipywidgets.BoundedIntText(value=400, min=1, max=100_000, description="tokens at most", **WIDE)
        self.seed = ipywidgets.BoundedIntText(value=0, min=0, max=2**31 - 1, description="seed", **WIDE)
        self.next_seed = ipywidgets.Checkbox(value=True, description="count the seed on after a run", indent=False)
        self.go, self.halt, self.forget = (
            ipywidgets.Button(description=name) for name in ("Generate", "Stop", "Clear the history")
        )

    def args(self) -> SamplingArgs:
        """The settings as they stand. Raises ValueError naming a field that cannot be."""
        numbers = {name: number.value for name, (number, _) in self._pairs.items()}
        ids = {name: steps.ids(getattr(self, name).value, name) for name in ("token_ban", "token_stop")}
        return SamplingArgs(**numbers, **ids, chunk_len=self.chunk_len.value)

    @property
    def writing(self) -> bool:
        """A text is being written at this moment."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when the text is written."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the thread and take every widget of the panel out of the kernel."""
        self._end()
        close_all(self)

    def _open(self, *_) -> None:
        self._end()
        path = self.path.value.strip() or self.file.value
        self.engine, self.chances.value, self.text.value = None, "", ""  # nothing old beside a message, here and below
        self.status.value = steps.note(f"loading {path} …")
        engine, self.tokenizer = self._load(path, self.strategy.value)
        c = engine.config
        self._model = f"{Path(path).name}: {c.n_layer} layers, width {c.n_embd}, {c.vocab_size:,} tokens"
        self.prompt.continuous_update = c.n_layer * c.n_embd**2 < QUICK
        self.engine = engine
        self._read()

    def _need(self, prompt: bool = True) -> None:
        """Raise ValueError if the model, or the prompt, that stands in its field is not the one at work."""
        if self.engine is None:
            raise ValueError(f"no model: {self.path.value.strip() or self.file.value} was not loaded; give another")
        if prompt and self._first is None:
            raise ValueError("the prompt could not be read; change it")

    def _read(self, *_) -> None:
        """Read the prompt: once, for everything that is written after it."""
        self._end()
        self._need(prompt=False)
        self._first, self.chances.value, self.text.value = None, "", ""
        prompt = self.prompt.value
        first = generate(self.engine, self.tokenizer, prompt, 0, self.args())
        for _piece in first:
            pass
        self._first, self._prompt, self._logits, self._drawn = first, prompt, first.logits, []
        self.text.value = steps.text_html(prompt, "")
        self.status.value = steps.note(f"{self._model}; the prompt has {len(first.prompt_tokens)} tokens")
        self._draw()

    def _draw(self, *_) -> None:
        """The chances of the token after what stands there, with the knobs as they are."""
        with self._lock:
            self._need()
            args = self.args()
            after = steps.after(self.tokenizer, args, self._drawn, self._logits)
            tail = (self._prompt + self.tokenizer.decode(self._drawn))[-40:]
            self.chances.value = steps.chances_html(steps.stages(self._logits, args, after), self.tokenizer, tail)

    def _begin(self, *_) -> None:
        self._end()
        self._need()
        args, seed = self.args(), self.seed.value
        g = generate(self.engine, self.tokenizer, "", self.n_tokens.value, args, self._first.state,
                     torch.Generator().manual_seed(seed), steps.stop_texts(self.stop.value),
                     self._first.logits)  # fmt: skip
        self._generation = g
        self._thread = threading.Thread(target=self._run, args=(g, args, seed), daemon=True)
        if self.next_seed.value:
            self.seed.value = (seed + 1) % 2**31
        self._thread.start()

    def _run(self, g: Generation, args: SamplingArgs, seed: int) -> None:
        """The thread. What goes wrong here is told by the status: `error` belongs to the controls."""
        try:
            self._write(g, args, seed)
        except Exception as error:  # noqa: BLE001  whatever it is, the reader must see it
            self.status.value = steps.note(f"stopped by an error: {type(error).__name__}: {error}")

    def _write(self, g: Generation, args: SamplingArgs, seed: int) -> None:
        """Write, show, and at the end remember the run."""
        began = shown = time.monotonic()
        try:
            for _piece in g:
                if time.monotonic() - shown > REDRAW:
                    shown = time.monotonic()
                    self._show(g, began, "writing")
        finally:
            self.runs = [(steps.settings(args, seed), self._prompt, g.text), *self.runs][:KEPT]
            self.history.value = steps.history_html(self.runs)
            self._show(g, began, "cancelled" if g.cancelled else "done")

    def _show(self, g: Generation, began: float, what: str) -> None:
        with self._lock:
            self._logits, self._drawn = g.logits, list(g.tokens)
        self.text.value = steps.text_html(self._prompt, g.text)
        speed = len(g.tokens) / max(time.monotonic() - began, 1e-6)
        ended = f", ended by {g.stopped_by!r}" if g.stopped_by is not None else ""
        self.status.value = steps.note(f"{what}: {len(g.tokens)} tokens{ended}, {speed:,.0f} a second")
        with contextlib.suppress(ValueError):  # a knob that cannot be: was told when it was moved
            self._draw()

    def _halt(self, *_) -> None:
        if self._generation is not None:
            self._generation.cancel()

    def _end(self) -> None:
        """Stop what is being written and wait until its thread has gone."""
        self._halt()
        self.wait()
        self._generation = self._thread = None

    def _forget(self, *_) -> None:
        self.runs, self.history.value = [], ""


def panel(path: str | os.PathLike, prompt: str = "Once there was a ", folder: str | os.PathLike = "../runs",
          start: SamplingArgs = START) -> SamplingPanel:  # fmt: skip
    """The panel on a checkpoint; the reader's own runs below `folder` can be chosen instead, or any file typed in."""
    return SamplingPanel([str(path), *steps.own_runs(folder)], prompt, start)
