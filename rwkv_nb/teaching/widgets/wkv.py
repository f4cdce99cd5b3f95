"""The state panel of notebook 04: a memory that reads a text, stopped after any letter.

    trace = pair_table("the rat ate the tart", half_life=8)      states, guesses: everything the drawings need
    panel("the rat ate the tart")                                text, position and half-life to play with

`pair_table` is a memory made by hand, whose state can be read: the row of a letter says what came after it. A trained
model's head goes into the same drawings through `model_trace`.

What it is not: the operator (rwkv_nb.wkv) that the model computes with; a table of letters needs five lines of numpy.
Symbols: T letters, N rows (keys) and columns (values) of a state, d the decay of a step, half-life ln 2 / -ln d.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure

from rwkv_nb.teaching import plots
from rwkv_nb.teaching.widgets import Panel, number_and_slider
from rwkv_nb.teaching.wkv_pictures import heat, visible

LONGEST = 400  # letters: more would make the slider useless and the states large
BARS = 8


@dataclass(frozen=True)
class Trace:
    """What a memory held after each letter of a text.

    states (T, N, N) as [key, value]; guesses (T, M): weight of each of `choices` as the next letter; rows, columns:
    labels of the state's axes, or a name for each; reads: the row that is read after each letter, if it is one row.
    """

    text: str
    states: np.ndarray
    guesses: np.ndarray
    choices: tuple[str, ...]
    rows: tuple[str, ...] | str
    columns: tuple[str, ...] | str
    reads: tuple[int, ...] | None = None

    @property
    def signed(self) -> bool:
        return bool(self.states.min() < 0)

    def scaled(self) -> np.ndarray:
        """The states as they are drawn: of a model, each row by its own largest entry, since slow rows collect more."""
        if not self.signed:
            return self.states
        return self.states / np.abs(self.states).max(axis=(0, 2), keepdims=True).clip(min=1e-9)

    def guess(self, t: int) -> str | None:
        """The likeliest next letter after letter number t (from 0); None if nothing speaks for any."""
        best = int(self.guesses[t].argmax())
        return self.choices[best] if self.guesses[t, best] > 0 else None


def _check(text: str) -> None:
    if not 1 <= len(text) <= LONGEST:
        raise ValueError(f"the text has {len(text)} letters; give it 1 to {LONGEST}")


def pair_table(text: str, half_life: float = 0) -> Trace:
    """Store for each letter the pair (letter before it, letter itself); read with the letter itself.

    half_life: in letters, 0 for no forgetting. The guess is the read row of the state: what came after this letter.
    """
    _check(text)
    letters = tuple(sorted(set(text)))
    places = [letters.index(c) for c in text]
    d = 0.5 ** (1 / half_life) if half_life else 1.0
    state = np.zeros((len(letters), len(letters)))
    states = []
    for t, here in enumerate(places):
        state = d * state
        if t:
            state[places[t - 1], here] += 1
        states.append(state)
    guesses = np.stack([s[here] for s, here in zip(states, places, strict=True)])
    return Trace(text, np.stack(states), guesses, letters, letters, letters, tuple(places))


@torch.no_grad()
def model_trace(model, tokenizer, text: str, layer: int = 0, head: int = 0) -> Trace:
    """One head of a trained RWKV, letter by letter: its state, rows sorted from the longest half-life to the shortest.

    The guesses are the probabilities that the whole model gives to each next letter.
    """
    _check(text)
    order = model.blocks[layer].att.time_decay[head].argsort()
    state, states, guesses = None, [], []
    for token in tokenizer.encode(text):
        logits, state = model(torch.tensor([[token]]), state)
        states.append(state[3 * layer + 1][0, head][order])
        guesses.append(torch.softmax(logits[0, 0], dim=0))
    choices = tuple(tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    names = ("key channels, slow to fast", "value channels")
    return Trace(text, torch.stack(states).numpy(), torch.stack(guesses).numpy(), choices, *names)


def frames_figure(trace: Trace, times: list[int]) -> Figure:
    """The state after some letters, side by side; above each the text as far as it was read."""
    fig, axes = plots.figure(width=8.6, height=2.9, cols=len(times), squeeze=False)
    states = trace.scaled()[list(times)]
    for ax, state, t in zip(axes[0], states, times, strict=True):
        image = heat(ax, state, trace.rows, trace.columns, np.abs(states).max(), trace.signed)
        ax.set_title(("…" if t > 13 else "") + visible(trace.text[max(0, t - 13) : t + 1]), fontsize=9, loc="right")
    fig.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    return fig


def course_figure(trace: Trace, channel: int = 0) -> Figure:
    """One column of the state (a value channel) against time: a line of the picture is a key channel."""
    fig, ax = plots.figure(width=8.6, height=4)
    image = heat(ax, trace.scaled()[:, :, channel].T, trace.rows, tuple(trace.text), signed=trace.signed)
    fig.colorbar(image, ax=ax, shrink=0.8)
    return fig


def state_figure(trace: Trace, t: int) -> Figure:
    """The state after letter number t (from 0), and beside it what it says about the next letter."""
    fig, (left, right) = plots.figure(width=8.2, height=3.6, cols=2, gridspec_kw={"width_ratios": [1.5, 1]})
    states = trace.scaled()
    image = heat(left, states[t], trace.rows, trace.columns, np.abs(states).max(), trace.signed)
    fig.colorbar(image, ax=left, shrink=0.9)
    left.set_title(f"state after {t + 1} letter{'s' if t else ''}")
    if trace.reads is not None:
        row = trace.reads[t]
        left.axhspan(row - 0.5, row + 0.5, fill=False, edgecolor=plots.COLOURS[1], linewidth=2.5)
    best = np.sort(np.argsort(-trace.guesses[t], kind="stable")[:BARS])
    right.barh([visible(trace.choices[i]) for i in best], trace.guesses[t][best], **plots.bar(0))
    right.invert_yaxis()
    right.set(title=f"what comes after {visible(trace.text[t])}?", xlim=(0, max(1.0, trace.guesses.max()) * 1.05))
    return fig


def story_html(trace: Trace, t: int) -> str:
    """The text with the letter at hand marked, and the guess against what really comes."""
    before, here, after = (html.escape(x) for x in (trace.text[:t], trace.text[t], trace.text[t + 1 :]))
    line = f"<p style='font-family:monospace'>{before}<mark><b><u>{here}</u></b></mark>{after}</p>"
    if t + 1 == len(trace.text):
        return line + "<p>the text ends here</p>"
    guess, truth = trace.guess(t), trace.text[t + 1]
    if guess is None:
        return line + f"<p>nothing is known yet about what follows; next comes “{html.escape(visible(truth))}”</p>"
    verdict = "right" if guess == truth else f"next comes “{html.escape(visible(truth))}”"
    return line + f"<p>guess: “{html.escape(visible(guess))}”, {verdict}</p>"


def panel(text: str, half_life: int | None = 0, trace: Callable[[str, int], Trace] = pair_table,
          still: str = Panel.still) -> Panel:
    """Step through a text and watch the state.

    The controls are attributes of the Panel: text, position (letters read, from 1), half_life (None: there is none);
    results: story (HTML), picture (Image). `trace` makes the states from a text and a half-life. `still`: how the page
    goes on for readers without a kernel.
    """
    label = {"style": {"description_width": "initial"}}
    words = ipywidgets.Text(value=text, description="Text", layout={"width": "95%"}, **label)
    position, slider = number_and_slider("letters read", min(8, len(text)), 1, len(text))
    life, life_slider = number_and_slider("half-life in letters (0: forget nothing)", half_life or 0, 0, 50)
    lives = [] if half_life is None else [ipywidgets.HBox([life, life_slider])]
    story, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    result = Panel("State of a memory", [words, ipywidgets.HBox([position, slider]), *lives, story, picture])
    result.text, result.position, result.half_life = words, position, None if half_life is None else life
    result.story, result.picture, result.still = story, picture, still
    made: dict[str, Trace] = {}

    def draw(_change: object = None) -> None:
        if not made:
            remember()  # the text is at fault: say so again
        t = min(position.value, len(made["now"].text)) - 1
        drawn = plots.png(state_figure(made["now"], t))  # before the text changes: both shall change at once
        story.value, picture.value = story_html(made["now"], t), drawn

    def remember() -> None:
        made.clear()
        made["now"] = trace(words.value, life.value)

    def typed(_change: object) -> None:
        remember()
        position.max = slider.max = len(words.value)
        if position.value == len(words.value):
            draw()
        position.value = len(words.value)  # draws: who types sees what the last letter did

    def aged(_change: object) -> None:
        remember()
        draw()

    words.observe(result.guard(typed), names="value")
    life.observe(result.guard(aged), names="value")
    position.observe(result.guard(draw), names="value")
    result.guard(draw)()
    return result
