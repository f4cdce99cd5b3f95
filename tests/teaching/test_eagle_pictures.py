"""The pictures of notebook 09, and its stand-in with the World vocabulary."""

from __future__ import annotations

import torch

from rwkv_nb.inference.engine import load_engine, read_config
from rwkv_nb.model.weights import load_weights
from rwkv_nb.teaching import eagle_pictures as draw
from rwkv_nb.teaching import plots

PNG = b"\x89PNG"


def test_the_stand_in_has_eagles_names_and_is_the_same_each_time(tmp_path):
    path = draw.random_world(tmp_path / "new" / "world.pth", n_layer=2, n_embd=64)
    config = read_config(path)
    assert (config.n_layer, config.n_embd, config.vocab_size) == (2, 64, 65536)
    again = load_weights(draw.random_world(tmp_path / "again.pth", n_layer=2, n_embd=64))
    for name, x in load_weights(path).items():
        assert x.dtype is torch.bfloat16 and torch.equal(x, again[name])
        assert x.abs().max() > 0, "a matrix of zeros cannot be stored in the package's 8 bits"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["world.pth"]
    logits, _ = load_engine(path, "cpu fp16i8", "package")(torch.tensor([[11, 6699]]))
    assert torch.isfinite(logits).all()


def test_shares_are_written_beside_the_bars():
    ax = draw.shares_figure({"a": 3e9, "b": 1e9}, 1e9, "GB").axes[0]
    assert [t.get_text().strip() for t in ax.texts] == ["75.0%", "25.0%"]
    assert [bar.get_width() for bar in ax.patches] == [3, 1]


def test_what_grows_and_what_does_not():
    ax = draw.contexts_figure({"state": 100.0}, {"cache": 10.0}, longest=1e3).axes[0]
    state, cache = (line.get_ydata() for line in ax.get_lines())
    assert set(state) == {100.0} and abs(cache[0] - 10) < 1e-9 and abs(cache[-1] - 1e4) < 1e-6


def test_scores_stand_in_their_groups_with_their_means():
    groups = {"one": {"a": 50.0, "b": 70.0}, "two": {"c": 10.0}}
    ax = draw.scores_figure(groups, {"one": 60, "two": 10}).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [50, 70, 10]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    one, two = (line.get_ydata()[0] for line in ax.get_lines())
    assert (one, two) == (60, 10) and ax.get_legend().get_texts()[1].get_text() == "two, mean 10"


def test_figures_draw():
    errors = {"a": 0.01, "b": 0.002}
    figures = [draw.levels_figure([0.1, -0.2], [0.1, -0.25], [-0.25, 0.0, 0.1]), draw.losses_figure({8: 1.0, 4: 1.1})]
    figures.append(draw.errors_figure(errors, {"a": 8, "b": 8.5}))
    for fig in figures:
        assert plots.png(fig).startswith(PNG)
