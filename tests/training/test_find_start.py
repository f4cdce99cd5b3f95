"""Which file a run goes on from: the newest that can be read and fits, whatever else lies in the folder."""

import dataclasses
import io
import itertools
import os
import pickle
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv_nb.model.initialization import init_weights
from rwkv_nb.training.checkpoint import save_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import CheckpointError
from rwkv_nb.training.resume import complete, find_start, prune_states
from rwkv_nb.training.trainer_state import TrainerState, random_state, restore_random

FLAGS = {"n_layer": 2, "n_embd": 32, "head_size_a": 32, "vocab_size": 20, "accelerator": "cpu", "precision": "bf16",
         "my_pile_stage": 3, "magic_prime": 149, "micro_bsz": 2016, "ctx_len": 8}  # fmt: skip
STEPS = 20  # batches in a mini-epoch: 40320 / 2016
WEIGHTS = init_weights(TrainConfig(**FLAGS).model_config(), seed=0)
OTHER = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
TOKENS = 1240


def config(folder, **changes):
    return TrainConfig(**{**FLAGS, "proj_dir": str(folder), **changes})


def state(epoch, batch, weights=WEIGHTS, checkpoint="", **flags):
    cfg = config("elsewhere", **flags)
    moments = {name: {"step": torch.tensor(3.0), "exp_avg": torch.ones_like(w)} for name, w in weights.items()}
    return TrainerState(
        epoch=epoch, batch=batch, step=7, epoch_begin=1, warmup_steps=30, flags=cfg.flags(), n_tokens=TOKENS,
        weights=weights, optimizer=moments, scaler={}, ranks=[{"loss_sum": 2.5, "random": random_state()}],
        checkpoint=checkpoint,
    )  # fmt: skip


def put(folder, name, weights=WEIGHTS, **changes):
    """A file of this name, with what belongs into it."""
    path = Path(folder, name)
    if name.endswith(".pth"):
        return save_checkpoint(weights, path)
    numbers = [int(word) for word in name.removeprefix("rwkv-").removesuffix(".state").split(".")]
    if len(numbers) == 1:
        return state(*numbers, STEPS, weights, f"rwkv-{numbers[0]}.pth", **changes).save(path)
    return state(*numbers, weights, **changes).save(path)


def found(folder, **changes):
    return find_start(config(folder, **changes), TOKENS)


def test_the_furthest_wins(tmp_path):
    for names, wanted, place in [
        (["rwkv-init.pth"], "rwkv-init.pth", (0, 0)),
        (["rwkv-0.5.state"], "rwkv-0.5.state", (0, 5)),
        (["rwkv-0.pth"], "rwkv-0.pth", (1, 0)),
        (["rwkv-0.state"], "rwkv-0.state", (1, 0)),
        (["rwkv-9.pth", "rwkv-10.pth", "rwkv-10.state"], "rwkv-10.state", (11, 0)),
        (["rwkv-11.9.state", "rwkv-11.12.state"], "rwkv-11.12.state", (11, 12)),
        (["rwkv-12.pth"], "rwkv-12.pth", (13, 0)),
    ]:
        for name in names:
            put(tmp_path, name)
        start = found(tmp_path)
        assert (start.path.name, start.position) == (wanted, place)
    assert start.state is None and start.cfg.epoch_begin == 13 and start.cfg.warmup_steps == 30, "as officially"
    alone = found(tmp_path, resume="weights", my_pile_stage=2)
    assert alone.path.name == "rwkv-12.pth" and alone.cfg.warmup_steps == 10


def test_a_state_brings_its_schedule_along(tmp_path):
    put(tmp_path, "rwkv-5.state"), put(tmp_path, "rwkv-5.pth")
    start = found(tmp_path)
    assert (start.cfg.epoch_begin, start.cfg.warmup_steps, start.state.step, start.position) == (1, 30, 7, (6, 0))
    assert start.state.ranks[0]["loss_sum"] == 0.0, "a new mini-epoch"
    assert found(tmp_path, warmup_steps=4).cfg.warmup_steps == 4
    assert "goes on from" in start.notes[-1] and len(start.notes) == 1
    assert "lr_init: 0.0006 -> 0.001" in found(tmp_path, lr_init=1e-3).notes[0]


@pytest.mark.parametrize(
    ("flags", "n_tokens", "words"),
    [
        ({"ctx_len": 4}, TOKENS, "ctx_len=4, it was 8"),
        ({"micro_bsz": 1008}, TOKENS, "micro_bsz=1008, it was 2016; epoch_steps=40, it was 20"),
        ({"my_pile_stage": 2}, TOKENS, "my_pile_stage=2, it was 3"),
        ({"random_seed": 3}, TOKENS, "random_seed=3, it was -1"),
        ({"accumulate_grad_batches": 2}, TOKENS, "accumulate_grad_batches=2, it was 1"),
        ({"devices": 2, "micro_bsz": 1008}, TOKENS, "2 processes, it was 1"),
        ({}, 99, "the data has 99 tokens, it had 1240"),
    ],
)
def test_a_state_that_does_not_fit_says_why(tmp_path, flags, n_tokens, words):
    for name in ("rwkv-3.state", "rwkv-3.pth", "rwkv-4.2.state"):
        put(tmp_path, name)
    start = find_start(config(tmp_path, **flags), n_tokens)
    assert start.path.name == "rwkv-3.pth" and start.state is None and start.cfg.epoch_begin == 4
    assert len(start.notes) == 2 and all(words in note and "weights alone" in note for note in start.notes)


def test_a_model_of_another_size_is_named(tmp_path):
    put(tmp_path, "rwkv-3.2.state"), put(tmp_path, "rwkv-2.pth")
    with pytest.raises(CheckpointError, match=r"rwkv-2\.pth.*\n?.*load_partial|rwkv-2\.pth"):
        found(tmp_path, n_layer=3)
    assert found(tmp_path, n_layer=3, load_partial=1).path.name == "rwkv-2.pth"


def test_a_state_and_its_checkpoint(tmp_path):
    put(tmp_path, "rwkv-init.pth")
    put(tmp_path, "rwkv-3.state")
    start = found(tmp_path)
    assert start.path.name == "rwkv-init.pth" and "rwkv-3.pth is not there any more" in start.notes[0]
    put(tmp_path, "rwkv-3.pth", OTHER)
    start = found(tmp_path)
    assert start.path.name == "rwkv-3.pth" and start.state is None and "holds other weights" in start.notes[0]
    put(tmp_path, "rwkv-3.pth")
    assert found(tmp_path).state is not None, "the file has bfloat16, the state what it was rounded from"
    (tmp_path / "rwkv-3.pth").write_bytes((tmp_path / "rwkv-3.pth").read_bytes()[:-100])
    start = found(tmp_path)
    assert start.state is not None and "rwkv-3.state has the same weights and replaces it" in start.notes[0]


def test_a_state_that_was_renamed(tmp_path):
    put(tmp_path, "rwkv-init.pth")
    os.rename(put(tmp_path, "rwkv-1.2.state"), tmp_path / "rwkv-7.2.state")
    start = found(tmp_path)
    assert start.path.name == "rwkv-init.pth" and "renamed: it is of mini-epoch 1, batch 2" in start.notes[0]


def test_what_a_killed_run_left_is_completed(tmp_path):
    put(tmp_path, "rwkv-2.pth")
    line = "3 1.5 4.4 0.001 2026-01-02 03:04:05.6 2\n"
    for has_file, has_line in itertools.product((False, True), repeat=2):
        name = f"rwkv-3.{STEPS}.state"
        dataclasses.replace(state(3, STEPS, OTHER, "rwkv-3.pth"), log_line=line).save(tmp_path / name)
        (tmp_path / "train_log.txt").write_text("NEW RUN\n" + (line if has_line else ""), encoding="utf-8")
        if has_file:
            put(tmp_path, "rwkv-3.pth", OTHER)
        start = found(tmp_path)
        assert start.path.name == name and start.position == (4, 0)
        assert complete(start.state, start.path, tmp_path, "bf16").name == "rwkv-3.state"
        assert sorted(path.name for path in tmp_path.glob("rwkv-3*")) == ["rwkv-3.pth", "rwkv-3.state"]
        assert (tmp_path / "train_log.txt").read_text(encoding="utf-8") == "NEW RUN\n" + line, "once"
        assert found(tmp_path).path.name == "rwkv-3.state" and len(found(tmp_path).notes) == 1
        (tmp_path / "rwkv-3.state").unlink(), (tmp_path / "rwkv-3.pth").unlink()


def test_pruning(tmp_path):
    names = ["rwkv-1.state", "rwkv-2.state", "rwkv-3.4.state", "rwkv-3.5.state", "rwkv-9.state", "rwkv-9.1.state"]
    for name in names:
        (tmp_path / name).touch()
    keep = ["rwkv-3.pth", "rwkv-final.pth", "mine.state", "rwkv-x.state"]
    for name in keep:
        (tmp_path / name).touch()
    ours = {tmp_path / "rwkv-3.5.state"}
    assert sorted(prune_states(tmp_path, ours, (3, 4), STEPS)) == ["rwkv-3.4.state", "rwkv-9.1.state", "rwkv-9.state"]
    left = {path.name for path in tmp_path.iterdir()} - set(keep)
    assert {name for name in left if not name.endswith(".old")} == {"rwkv-2.state", "rwkv-3.5.state"}
    assert len(left) == 4 and prune_states(tmp_path, ours, (3, 4), STEPS) == []


def test_a_truncated_state_is_passed_over_whatever_its_length(tmp_path):
    put(tmp_path, "rwkv-3.pth"), put(tmp_path, "rwkv-init.pth")
    path = put(tmp_path, "rwkv-3.state")
    whole = path.read_bytes()
    assert found(tmp_path).state is not None
    for length in [*range(0, 300, 23), *range(300, len(whole) - 300, 9973), *range(len(whole) - 300, len(whole), 23)]:
        path.write_bytes(whole[:length])
        start = found(tmp_path)
        assert (start.path.name, start.state) == ("rwkv-3.pth", None)
        assert len(start.notes) == 1 and "rwkv-3.state" in start.notes[0]
    draw = random.Random(0)
    for _ in range(60):  # a flipped bit is found, or changes nothing that is read
        noise = bytearray(whole)
        noise[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(noise)
        start = found(tmp_path)
        assert start.state is None or all(torch.equal(start.weights[name], w) for name, w in WEIGHTS.items())


def test_a_hostile_state_is_refused_and_does_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    put(tmp_path, "rwkv-init.pth")
    torch.save({**vars(state(3, 2)), "scaler": Hostile()}, tmp_path / "rwkv-3.2.state")
    (tmp_path / "rwkv-4.2.state").write_bytes(pickle.dumps(Hostile(), protocol=2))
    start = found(tmp_path)
    assert start.path.name == "rwkv-init.pth" and not (tmp_path / "harm").exists()
    assert len(start.notes) == 2 and all("refused" in note for note in start.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99}, {"step": "7"}, {"step": -5}, {"weights": {}}, {"weights": {"emb.weight": 3}}, {"optimizer": 3},
        {"optimizer": {"nobody": {}}}, {"optimizer": {"emb.weight": {"exp_avg": torch.zeros(3, 3)}}}, {"ranks": []},
        {"ranks": [{"loss_sum": 1.0}]}, {"ranks": [{"loss_sum": 1.0, "random": {"torch": torch.zeros(3)}}]},
        {"ranks": [{"loss_sum": 1.0, "random": {**random_state(), "torch": torch.zeros(9, dtype=torch.uint8)}}]},
        {"ranks": [{"loss_sum": 1.0, "random": {**random_state(), "python": [torch.zeros(4), None]}}]},
        {"extra": 1}, {"flags": None}, {"epoch": None},
    ],
    ids=lambda change: f"{next(iter(change))}",
)  # fmt: skip
def test_readable_files_that_are_no_states(tmp_path, change):
    put(tmp_path, "rwkv-init.pth")
    torch.save({**vars(state(3, 2)), **change}, tmp_path / "rwkv-3.2.state")
    start = found(tmp_path)
    assert start.path.name == "rwkv-init.pth" and "rwkv-3.2.state" in start.notes[0]


def test_other_things_under_the_name_of_a_state(tmp_path):
    put(tmp_path, "rwkv-init.pth")
    for name, content in (("rwkv-1.2.state", WEIGHTS), ("rwkv-1.3.state", [1]), ("rwkv-1.4.state", {})):
        torch.save(content, tmp_path / name)
    (tmp_path / "rwkv-8.state").mkdir()
    start = found(tmp_path)
    assert start.path.name == "rwkv-init.pth" and len(start.notes) == 3
    with pytest.raises(CheckpointError, match="no trainer state"):
        found(tmp_path, load_model=str(tmp_path / "rwkv-1.2.state"))


def test_random_numbers_go_on(tmp_path):
    import numpy as np

    def draws():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    draws()
    saved = random_state()
    torch.save(saved, tmp_path / "x")
    first = draws()
    restore_random(torch.load(tmp_path / "x", weights_only=True))
    assert draws() == first


def test_nothing_to_begin_with(tmp_path):
    with pytest.raises(FileNotFoundError, match="my_pile_stage=1"):
        found(tmp_path)
    (tmp_path / "rwkv-3.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read.*\n.*rwkv-3\.pth"):
        found(tmp_path)


def _bytes(write):
    with tempfile.TemporaryDirectory() as folder:
        return write(folder).read_bytes()


GOOD_PTH, OTHER_PTH = _bytes(lambda f: put(f, "rwkv-0.pth")), _bytes(lambda f: put(f, "rwkv-0.pth", OTHER))
KINDS = ("absent", "good", "other", "damaged")
folders = st.fixed_dictionaries({
    "init": st.sampled_from(KINDS[:2]),
    "pth": st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    "end": st.lists(st.sampled_from((*KINDS[:2], "misfit", "damaged")), min_size=3, max_size=3),
    "mid": st.dictionaries(st.tuples(st.integers(0, 3), st.integers(1, STEPS - 1)),
                           st.sampled_from(("good", "misfit", "damaged")), max_size=3),
})  # fmt: skip


def state_bytes(epoch, batch, kind, checkpoint=""):
    buffer = io.BytesIO()
    torch.save(vars(state(epoch, batch, checkpoint=checkpoint, **({"ctx_len": 4} if kind == "misfit" else {}))), buffer)
    return buffer.getvalue()[: -50 if kind == "damaged" else None]


@settings(max_examples=60, deadline=None)
@given(folders)
@example({"init": "absent", "pth": ["absent"] * 3, "end": ["absent"] * 3, "mid": {}})
@example({"init": "good", "pth": ["good", "damaged", "other"], "end": ["absent", "good", "good"],
          "mid": {(3, 1): "misfit"}})  # fmt: skip
def test_the_newest_that_can_be_used(content):
    usable = [((0, 0), False)] if content["init"] == "good" else []
    with tempfile.TemporaryDirectory() as folder:
        if content["init"] == "good":
            Path(folder, "rwkv-init.pth").write_bytes(GOOD_PTH)
        for n, (pth, end) in enumerate(zip(content["pth"], content["end"], strict=True)):
            if pth != "absent":
                data = {"good": GOOD_PTH, "other": OTHER_PTH, "damaged": GOOD_PTH[:-50]}[pth]
                Path(folder, f"rwkv-{n}.pth").write_bytes(data)
            if end != "absent":
                Path(folder, f"rwkv-{n}.state").write_bytes(state_bytes(n, STEPS, end, f"rwkv-{n}.pth"))
            usable += [((n + 1, 0), False)] if pth in ("good", "other") else []
            usable += [((n + 1, 0), True)] if end == "good" and pth in ("good", "damaged") else []
        for (epoch, batch), kind in content["mid"].items():
            Path(folder, f"rwkv-{epoch}.{batch}.state").write_bytes(state_bytes(epoch, batch, kind))
            usable += [((epoch, batch), True)] if kind == "good" else []
        if not usable:
            with pytest.raises((CheckpointError, FileNotFoundError)):
                found(folder)
            return
        start = found(folder)
        assert (start.position, start.state is not None) == max(usable)
