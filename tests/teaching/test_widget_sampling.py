"""The sampling panel of notebook 08: its steps are the sampler's, its thread is stopped, freed and never silent."""

from __future__ import annotations

import html
import re
import threading
import time
import types

import ipywidgets
import pytest
import torch

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.inference.generation import generate
from rwkv_nb.inference.sampling import SamplingArgs, filter_probs
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.teaching import sampling_steps as steps
from rwkv_nb.teaching.widgets import sampling as widget
from rwkv_nb.training.checkpoint import save_checkpoint

CHARS = CharTokenizer.from_text("\n <>abcdefghijklmnopqrstuvwxyz")
V = CHARS.vocab_size


class Engine:
    """Stands for a model: the next token depends on the last one; `gate` lets a test hold it while it works."""

    training = False

    def __init__(self, seed: int = 0, gate: threading.Event | None = None):
        self.table = 3 * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
        self.table[:, 0] = -30  # no newline
        self.config = types.SimpleNamespace(vocab_size=V, n_layer=1, n_embd=8, dropout=0.0)
        self.emb, self.gate, self.read, self.fail_at = types.SimpleNamespace(weight=self.table), gate, 0, None

    def __call__(self, idx, state=None, *, full_output=True):
        if self.gate is not None and idx.shape[1] == 1:
            self.gate.wait(60)
        self.read += idx.numel()
        if self.read == self.fail_at:
            raise RuntimeError("the engine has <broken>")
        return self.table[idx[:, -1:]], [idx[0, -1:]]


def make(engine=None, prompt="once", choices=("small.pth",), **start):
    engines = {"small.pth": engine or Engine(), "other.pth": Engine(1)}

    def load(path, strategy):
        if path not in engines:
            raise FileNotFoundError(f"{path}: no such checkpoint")
        return engines[path], CHARS

    args = SamplingArgs(**{"alpha_frequency": 0.0, "alpha_presence": 0.0, **start})
    panel = widget.SamplingPanel(choices, prompt, args, load)
    assert panel.error.value == ""
    return panel


def shown(panel) -> dict[str, list[str]]:
    """Token -> its cells, read back from the table of chances."""
    lines = re.findall(r"<th scope='row'[^>]*>(.*?)</th>(.*?)</tr>", panel.chances.value)
    return {name: [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", cells)] for name, cells in lines}


def test_the_last_stage_is_what_a_token_is_drawn_with():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    args = SamplingArgs(temperature=0.7, top_p=0.8, top_k=9, token_ban=(int(logits.argmax()),))
    found = steps.stages(logits, args)
    left = logits.clone()
    left[logits.argmax()] = -torch.inf
    assert list(found) == list(steps.STAGES)
    assert torch.equal(found[steps.TEMPERATURE], filter_probs(left, 0.7, 0.8, 9))
    assert torch.allclose(found[steps.MODEL], torch.softmax(logits.double(), 0))
    kept = [int((p > 0).sum()) for p in found.values()]
    assert kept[:2] == [50, 49] and 9 < kept[2] < 49 and kept[3:] == [9, 9]
    assert all(float(p.sum()) == pytest.approx(1) for p in found.values())
    hotter = steps.stages(logits, SamplingArgs(temperature=2.0, top_p=0.8, top_k=9, token_ban=args.token_ban))
    for name in steps.STAGES[:-1]:  # each knob changes its own column and those after it
        assert torch.equal(hotter[name], found[name])
    assert not torch.equal(hotter[steps.TEMPERATURE], found[steps.TEMPERATURE])


def test_the_penalties_are_those_of_the_row_that_draws():
    engine = Engine()
    args = SamplingArgs(temperature=0, alpha_presence=0.4, alpha_frequency=0.3)
    g = generate(engine, CHARS, "a", 12, args)
    "".join(g)
    for n in range(1, 12):  # greedy: what the stages call likeliest is what was drawn next
        logits = engine.table[g.tokens[n - 1]]
        left = steps.after(CHARS, args, g.tokens[:n], logits)
        assert int(steps.stages(logits, args, left)[steps.TEMPERATURE].argmax()) == g.tokens[n]
    assert len(set(g.tokens)) > 2


def test_rows_of_the_table_add_up_and_keep_what_a_penalty_brings_up():
    logits = torch.linspace(3, -3, V)
    left = logits.clone()
    left[:20] -= 9
    chances = steps.stages(logits, SamplingArgs(top_p=1.0), left)
    table = steps.rows(chances, CHARS, 6)
    assert len(table) == 7 and table[-1][0] == f"{V - 6} others"
    assert [sum(column) for column in zip(*(values for _, values in table), strict=True)] == pytest.approx([1] * 5)
    assert f"{steps.label(CHARS, 20)} (20)" in [name for name, _ in table]
    order = [values[0] for _, values in table[:-1]]
    assert order == sorted(order, reverse=True)
    one = torch.eye(V, dtype=torch.float64)[5]
    assert steps.likeliest({"a": one, "b": one}, 6) == [5]  # none that is cut everywhere


def test_labels():
    world = WorldTokenizer()
    assert steps.label(world, 0) == "end of document" and steps.label(world, 65530) == "no text"
    assert steps.label(world, 33155) == "Hello" and steps.label(CHARS, 0) == "⏎"
    assert [steps.percent(p) for p in (0, 0.0001, 0.1234, 1)] == ["–", "<0.1 %", "12.3 %", "100.0 %"]


def test_what_is_typed_is_read_or_named():
    assert steps.ids(" 3, 5 7", "token_ban") == (3, 5, 7) and steps.ids("", "token_ban") == ()
    for wrong in ("x", "-1", "1.5", "²"):
        with pytest.raises(ValueError, match="token_stop: .* is no token id"):
            steps.ids(wrong, "token_stop")
    assert steps.stop_texts(r"\n\n|User:||") == ["\n\n", "User:"] and steps.stop_texts("") == []
    assert steps.settings(SamplingArgs(0.5, 0.9, 4, 0.1, 0.0, token_ban=(3,)), 7) == (
        "temperature 0.5, top_p 0.9, top_k 4, alpha_frequency 0.1, token_ban (3,), alpha_decay 0.996, seed 7"
    )


def test_own_runs_newest_first_without_initial_weights(tmp_path):
    import os

    for age, name in enumerate(["b/rwkv-final.pth", "b/rwkv-init.pth", "a.pth", "c/d/deep.pth", "b/x.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert steps.own_runs(tmp_path) == [str(tmp_path / "b/rwkv-final.pth"), str(tmp_path / "a.pth")]
    assert steps.own_runs(tmp_path / "none") == []


def test_a_file_of_this_course_needs_no_vocabulary_beside_it(tmp_path):
    save_checkpoint(init_weights(ModelConfig(2, 64, 96), seed=0), tmp_path / "own.pth")
    engine, tokenizer = steps.load(tmp_path / "own.pth")
    assert engine.config.n_layer == 2 and tokenizer.decode([0, 1]) == "\n "
    CharTokenizer(reversed(tokenizer.chars)).save(tmp_path / "vocab.json")
    assert steps.load(tmp_path / "own.pth")[1].decode([95]) == "\n"


def test_the_chances_follow_every_knob_at_once():
    panel = make(top_p=1.0)
    everything = {}
    changes = {"temperature": 0.2, "top_p": 0.5, "top_k": 3}
    for name, value in changes.items():
        before = panel.chances.value
        getattr(panel, name).value = value
        assert panel.chances.value != before, name
        everything[name] = shown(panel)
        getattr(panel, name).value = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}[name]
        assert panel.chances.value == before, name
    assert everything["top_k"]["tokens left"] == [str(V)] * 3 + ["3", "3"]
    assert int(everything["top_p"]["tokens left"][2]) < V
    before = shown(panel)
    top = next(iter(before))
    panel.token_ban.value = re.search(r"\((\d+)\)", top)[1]
    assert shown(panel)[top][1:] == ["–"] * 4 and shown(panel)[top][0] == before[top][0]
    panel.token_ban.value = ""
    panel.token_stop.value, panel.chunk_len.value = "5", 3  # no effect on chances, but used
    assert panel.args() == SamplingArgs(1.0, 1.0, 0, 0.0, 0.0, token_stop=(5,), chunk_len=3)
    for slider, value in ((panel._pairs["temperature"][1], 0.0), (panel._pairs["top_p"][1], 0.25)):
        slider.value = value
    assert panel.temperature.value == 0 and panel.top_p.value == 0.25
    assert [row[-1] for row in shown(panel).values()].count("100.0 %") == 1
    panel._pairs["temperature"][1].value = 0.15000000000000002  # as a browser counts
    assert panel.temperature.value == 0.15
    panel.close()


def test_penalties_act_after_something_was_written():
    panel = make(top_p=1.0)
    quiet = panel.chances.value
    panel.alpha_presence.value = 1.5
    assert panel.chances.value == quiet  # nothing drawn yet: nothing to punish
    panel.n_tokens.value = 40
    panel.go.click()
    panel.wait()
    with_presence = shown(panel)
    assert "once" not in panel.chances.value.split("<table")[0]  # the tail of the text, not of the prompt
    panel.alpha_presence.value = 0.0
    without = shown(panel)
    assert with_presence != without and [r[0] for r in without.values()] == [r[1] for r in without.values()]
    panel.alpha_frequency.value = 0.5
    high = shown(panel)
    panel.alpha_decay.value = 0.5
    assert high != without and shown(panel) != high
    panel.close()


def test_it_writes_what_generate_writes_and_counts_the_seed_on():
    engine = Engine()
    panel = make(engine, temperature=1.3)
    panel.n_tokens.value, panel.seed.value = 30, 11
    read = engine.read
    panel.go.click()
    panel.wait()
    args, rng = SamplingArgs(temperature=1.3, alpha_frequency=0, alpha_presence=0), torch.Generator().manual_seed(11)
    want = "".join(generate(Engine(), CHARS, "once", 30, args, generator=rng, stop=["\n\n"]))
    assert panel.runs == [("temperature 1.3, top_p 0.85, seed 11", "once", want)]
    assert engine.read == read + 30  # the prompt was not read again
    assert panel.seed.value == 12 and "done: 30 tokens" in panel.status.value and not panel.writing
    assert html.escape(want) in panel.text.value and html.escape(want) in panel.history.value
    panel.next_seed.value, panel.seed.value = False, 11
    panel.go.click()
    panel.wait()
    assert panel.runs[0] == panel.runs[1] and panel.seed.value == 11
    panel.stop.value = want[5:7]
    panel.go.click()
    panel.wait()
    assert panel.runs[0][2] == want[: want.find(want[5:7])] and "ended by" in panel.status.value
    panel.forget.click()
    assert panel.runs == [] and panel.history.value == ""
    panel.close()


def test_stop_stops_and_what_was_written_stays():
    gate = threading.Event()
    panel = make(Engine(gate=gate))
    panel.n_tokens.value = 100_000
    gate.set()
    panel.go.click()
    assert panel.writing
    deadline = time.monotonic() + 60
    while "writing: " not in panel.status.value and time.monotonic() < deadline:
        time.sleep(0.01)
    panel.temperature.value = 2.0  # a knob moved meanwhile disturbs nothing, nor does one that cannot be
    panel.token_ban.value = "x"
    for _ in range(2):  # it has tried to draw the chances with that
        told = panel.status.value
        while panel.status.value == told and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "is no token id" in panel.error.value and panel.writing
    panel.token_ban.value = ""
    panel.halt.click()
    panel.wait()
    assert panel.error.value == "" and "cancelled: " in panel.status.value and len(panel.runs) == 1
    assert 0 < len(panel.runs[0][2]) < 100_000 and "temperature 1," in panel.runs[0][0]
    panel.close()


def test_a_new_prompt_model_or_text_ends_the_one_that_is_being_written():
    gate = threading.Event()
    gate.set()
    panel = make(Engine(gate=gate), choices=("small.pth", "other.pth"))
    panel.n_tokens.value = 100_000
    actions = [lambda: setattr(panel.prompt, "value", "upon"), lambda: setattr(panel.file, "value", "other.pth")]
    for action in actions:
        panel.go.click()
        thread = panel._thread
        while not panel._generation.tokens:
            time.sleep(0.001)
        action()
        assert not thread.is_alive() and not panel.writing and panel.error.value == ""
        assert panel.runs[0][2]
    assert [prompt for _, prompt, _ in panel.runs] == ["upon", "once"]  # each with the prompt that it continued
    assert "other.pth" in panel.status.value and "upon" in panel.text.value
    panel.go.click()
    thread = panel._thread
    panel.go.click()
    assert not thread.is_alive() and panel.writing
    thread = panel._thread
    panel.close()
    assert not thread.is_alive()


def test_nothing_that_goes_wrong_is_silent():
    engine = Engine()
    panel = make(engine, choices=("small.pth", "none.pth"))
    engine.fail_at = engine.read + 5
    panel.go.click()
    panel.wait()
    assert "stopped by an error: RuntimeError: the engine has &lt;broken&gt;" in panel.status.value  # in the thread
    assert len(panel.runs) == 1 and len(panel.runs[0][2]) == 4  # what there was of it
    panel.prompt.value = "Ö"
    assert "character &#x27;Ö&#x27;" in panel.error.value and panel.chances.value == ""
    panel.go.click()
    assert "the prompt could not be read" in panel.error.value and not panel.writing
    panel.prompt.value = "ab"
    assert panel.error.value == ""
    panel.token_ban.value = "x"
    assert "token_ban: &#x27;x&#x27; is no token id" in panel.error.value
    panel.token_ban.value = str(V)
    assert f"the vocabulary ends at {V - 1}" in panel.error.value
    panel.token_ban.value = " ".join(map(str, range(V)))
    assert "every token is banned" in panel.error.value
    panel.token_ban.value = ""
    panel.file.value = "none.pth"
    assert "none.pth: no such checkpoint" in panel.error.value and panel.chances.value == ""
    panel.temperature.value = 0.5
    assert "no model: none.pth was not loaded" in panel.error.value
    panel.go.click()
    assert "no model" in panel.error.value and not panel.writing
    panel.path.value = " other.pth "
    assert panel.error.value == "" and "other.pth" in panel.status.value and panel.chances.value
    panel.close()


def test_text_is_shown_not_obeyed():
    panel = make(prompt="<b>")
    tail = panel.chances.value.split("after <code>")[1].split("</p>")[0]
    assert "&lt;b&gt;" in panel.text.value and "&lt;b&gt;" in tail and "<b>" not in tail
    panel.close()


def test_every_control_has_a_name_and_every_slider_a_box():
    panel = make()
    boxes = [*(box for box, _ in panel._pairs.values()), panel.file, panel.path, panel.strategy, panel.prompt]
    boxes += [panel.token_ban, panel.token_stop, panel.stop, panel.chunk_len, panel.n_tokens, panel.seed]
    boxes += [panel.next_seed, panel.go, panel.halt, panel.forget]
    names = [box.description for box in boxes]
    assert all(names) and len(set(names)) == len(names)
    assert {name.split(" ")[0] for name in names} >= set(SamplingArgs.__dataclass_fields__)
    assert "needs a running kernel" in repr(panel)
    panel.close()


def test_hundreds_of_uses_leave_no_threads_and_no_widgets():
    known = ipywidgets.widgets.widget._instances
    threads, widgets = threading.active_count(), len(known)
    panel = make()
    panel.n_tokens.value = 3
    alive = len(known)
    for use in range(300):
        panel.temperature.value = 0.1 + use % 20 / 10
        panel.go.click()
        if use % 3:
            panel.halt.click()
    panel.wait()
    assert threading.active_count() == threads and len(known) == alive and len(panel.runs) == widget.KEPT
    panel.close()
    assert len(known) == widgets
    for _ in range(20):
        make().close()
    assert len(known) == widgets and threading.active_count() == threads
