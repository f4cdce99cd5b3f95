"""Does anything grow or drift in long use?

    python benchmarks/long_runs.py                              all parts, about six minutes
    python benchmarks/long_runs.py --only widgets
    python benchmarks/long_runs.py --only resume --steps 79000

    widgets      each panel of the notebooks, its controls moved 1,000 times: threads, open figures, widgets, objects of
                 Python's, memory
    resume       so many training steps of a tiny model in one run, and in ten: the same weights, bit for bit

Two hours of the run of notebook 07 are 79,000 steps (11 a second; benchmarks/RESULTS.md). The model here is tiny, so
that as many take minutes; what could drift, the schedule, the sampler, Adam, the random numbers of dropout and the
files, is the same. What it is not: a test of speed.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import psutil
import pytorch_lightning as pl
import torch
from wkv import print_table

from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.data.tokenizer import WorldTokenizer
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.teaching.widgets import (
    Panel,
    magic_prime,
    model,
    sampling,
    scaling_out,
    strategy,
    tokenizer,
    training,
    wkv,
)
from rwkv_nb.training.checkpoint import load_checkpoint, save_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.trainer import train

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
INPUTS = (ipywidgets.Text, ipywidgets.Textarea, ipywidgets.Dropdown, ipywidgets.ToggleButtons, ipywidgets.Checkbox,
          ipywidgets.IntSlider, ipywidgets.FloatSlider, ipywidgets.BoundedIntText, ipywidgets.BoundedFloatText,
          ipywidgets.IntText, ipywidgets.FloatText, ipywidgets.Button)  # fmt: skip
WARM_UP = 100  # uses before anything is counted: caches of fonts and of numbers are filled by then


# ---- widgets


def panels(folder: Path) -> dict[str, Callable[[], Panel]]:
    """Every panel of the notebooks, by notebook."""
    config, letters = ModelConfig(2, 32, len(LETTERS), head_size_a=32), CharTokenizer(LETTERS)
    weights = init_weights(config, seed=0)
    save_checkpoint(weights, folder / "rwkv-final.pth")
    letters.save(folder / "vocab.json")
    small, world = RWKV(config, weights), WorldTokenizer()

    def of_model(text: str, _half_life: int) -> wkv.Trace:
        return wkv.model_trace(small, letters, text)

    return {
        "01 tokens": lambda: tokenizer.TokenPanel(world, "Hello"),
        "03 magic prime": magic_prime.panel,
        "04 state by hand": lambda: wkv.panel("the rat ate the tart"),
        "04 state of a model": lambda: wkv.panel("the rat", None, of_model),
        "06 sizes": model.panel,
        "07 schedule": lambda: training.panel(TrainConfig(accelerator="cpu", my_exit_tokens=10**7)),
        "08 sampling": lambda: sampling.panel(folder / "rwkv-final.pth", "the ", folder),
        "09 strategies": strategy.panel,
        "10 scaling out": scaling_out.panel,
    }  # fmt: skip


def controls(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    """What a reader can move or type into or press."""
    found = [widget] if isinstance(widget, INPUTS) and not widget.disabled else []
    return found + [c for child in getattr(widget, "children", ()) for c in controls(child)]


def use(widget: ipywidgets.Widget, draw: random.Random) -> None:
    """One movement."""
    if isinstance(widget, ipywidgets.Button):
        widget.click()
    elif isinstance(widget, ipywidgets.Checkbox):
        widget.value = not widget.value
    elif hasattr(widget, "options"):
        widget.index = draw.randrange(len(widget.options))
    elif isinstance(widget, ipywidgets.Text | ipywidgets.Textarea):
        widget.value = "".join(draw.choice(LETTERS) for _ in range(draw.randint(0, 12)))
    elif hasattr(widget, "max"):
        low, high = widget.min, min(widget.max, widget.min + 200)
        widget.value = draw.randint(low, high) if isinstance(widget.value, int) else draw.uniform(low, high)
    else:
        widget.value = draw.randint(1, 100)


def held() -> dict[str, float]:
    """What this process holds at this moment."""
    gc.collect()
    return {
        "threads": threading.active_count(),
        "figures": len(plt.get_fignums()),
        "widgets": len(ipywidgets.widgets.widget._instances),
        "objects": len(gc.get_objects()),
        "MB": psutil.Process().memory_info().rss / 1e6,
    }


def use_often(make: Callable[[], Panel], times: int, seed: int = 0) -> dict[str, float]:
    """What has come on top after so many movements of one panel, and a warm-up; all of it, when the panel is closed."""
    draw, panel = random.Random(seed), make()
    for n in range(WARM_UP + times):
        if n == WARM_UP:
            settle(panel)
            before = held()
        use(draw.choice(controls(panel)), draw)
    settle(panel)
    after = held()
    return {name: after[name] - before[name] for name in before}


def settle(panel: Panel) -> None:
    """What was begun by a button comes to its end."""
    if hasattr(panel, "wait"):
        panel.wait()


def widgets(options: argparse.Namespace) -> bool:
    """A row for each panel; whether nothing grew. Objects and megabytes have some slack: caches, the allocator."""
    rows, fine = [], True
    with tempfile.TemporaryDirectory() as folder:
        for name, make in panels(Path(folder)).items():
            if options.panel and options.panel not in name:
                continue
            start = time.perf_counter()
            grown = use_often(make, options.times)
            good = not grown["threads"] and not grown["figures"] and not grown["widgets"]
            good &= grown["objects"] < options.times and grown["MB"] < 30
            fine &= good
            row = [f"{grown[key]:+.0f}" for key in grown]
            rows.append([name, *row, f"{time.perf_counter() - start:.0f}", "no" if good else "YES"])
    head = ["panel", "threads", "figures", "widgets", "objects", "MB", "seconds", "grows?"]
    print_table(f"Panels after {options.times:,} uses", head, rows)
    return fine


# ---- resume


class Stop(pl.Callback):
    """Ends the run, as Ctrl-C does, after some of its steps."""

    def __init__(self, after: int | None = None) -> None:
        self.left = after

    def on_train_batch_end(self, *_: object) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)


def resume_flags(folder: Path, name: str, steps: int) -> TrainConfig:
    return TrainConfig(
        proj_dir=str(folder / name), data_file=str(folder / "text.txt"), accelerator="cpu", precision="fp32", n_layer=2,
        n_embd=32, head_size_a=32, ctx_len=8, micro_bsz=2, my_pile_stage=3, magic_prime=149, epoch_save=1, lr_init=2e-3,
        lr_final=1e-4, weight_decay=0.01, my_exit_tokens=steps * 16, random_seed=5, dropout=0.1, save_minutes=0,
    )  # fmt: skip


def resume(options: argparse.Namespace) -> bool:
    """Whether the run in one piece and the one in ten end with the same weights."""
    torch.set_num_threads(1)  # so tiny a model is slowed down by more
    draw, steps = random.Random(7), options.steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("the eagle writes cell by cell. " * 40, encoding="utf-8")
        whole, pieces = (resume_flags(folder, name, steps) for name in ("whole", "pieces"))
        train(whole.replace(my_pile_stage=1), progress=False)
        Path(pieces.proj_dir).mkdir()
        first = Path(whole.proj_dir, "rwkv-init.pth").read_bytes()
        Path(pieces.proj_dir, "rwkv-init.pth").write_bytes(first)
        start = time.perf_counter()
        train(whole, progress=False)
        straight = time.perf_counter() - start
        stops = sorted(draw.sample(range(1, steps), 9))
        for a, b in zip([0, *stops], [*stops, None], strict=True):
            train(pieces, callbacks=[Stop(None if b is None else b - a)], progress=False)
        resumed = time.perf_counter() - start - straight
        finals = [load_checkpoint(Path(c.proj_dir, "rwkv-final.pth")) for c in (whole, pieces)]
        same = [torch.equal(finals[0][key], finals[1][key]) for key in finals[0]]
        changed = [not torch.equal(x, load_checkpoint(Path(whole.proj_dir, "rwkv-init.pth"))[key])
                   for key, x in finals[0].items()]  # fmt: skip
    row = [f"{steps:,}", f"{straight:.0f}", f"{resumed:.0f}", f"{sum(same)} of {len(same)}", f"{sum(changed)}"]
    head = ["steps", "seconds in one run", "in ten", "tensors equal, bit for bit", "that training changed"]
    print_table("One run and ten", head, [row])
    return all(same) and any(changed)


PARTS = {"widgets": widgets, "resume": resume}  # name: function of the options -> whether all is well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--times", type=int, default=1000, help="uses of each panel (default 1000)")
    parser.add_argument("--panel", help="only those with this in their name")
    parser.add_argument("--steps", type=int, default=24_000, help="training steps (default 24000)")
    options = parser.parse_args()
    return 0 if all([PARTS[name](options) for name in options.only]) else 1


if __name__ == "__main__":
    sys.exit(main())
