"""Checkpoints: official names and dtypes, written whole or not at all, read without running code, the newest found."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.training import checkpoint
from rwkv_nb.training.checkpoint import (
    CheckpointError,
    init_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    starting_checkpoint,
)  # fmt: skip
from rwkv_nb.training.config import TrainConfig

SMALL = {"n_layer": 2, "n_embd": 64, "vocab_size": 30, "accelerator": "cpu", "precision": "bf16"}


@pytest.fixture
def model():
    return RWKV(ModelConfig(n_layer=2, n_embd=64, vocab_size=30))


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_round_trip_in_every_dtype(tmp_path, model, flag, dtype):
    path = save_checkpoint(model, tmp_path / "a" / "rwkv-0.pth", flag)
    raw = torch.load(path, weights_only=True)
    assert type(raw) is dict and list(raw) == list(model.state_dict())
    for name, tensor in load_checkpoint(path).items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, model.state_dict()[name].to(dtype), rtol=0, atol=0)
    assert os.listdir(path.parent) == ["rwkv-0.pth"], "no temporary file is left"


def test_the_rwkv_package_computes_the_same_logits(tmp_path, model):
    from rwkv.model import RWKV as Reference

    weights = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    path = save_checkpoint(weights, tmp_path / "rwkv-7.pth", "fp32")
    reference = Reference(model=str(path.with_suffix("")), strategy="cpu fp32", verbose=False)
    logits, _ = reference.forward([3, 1, 4, 1, 5], None)
    ours = RWKV.from_checkpoint(path)(torch.tensor([[3, 1, 4, 1, 5]]))[0][0, -1]
    torch.testing.assert_close(ours.detach(), torch.as_tensor(logits), rtol=1e-4, atol=1e-4)


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    weights = {"_forward_module.module.emb.weight": torch.zeros(2), "model._orig_mod.head.weight": torch.ones(2)}
    torch.save(weights, tmp_path / "x.pth")
    assert set(load_checkpoint(tmp_path / "x.pth")) == {"emb.weight", "head.weight"}


def test_a_view_is_stored_alone(tmp_path):
    big = torch.zeros(1_000_000)
    path = save_checkpoint({"emb.weight": big[:10]}, tmp_path / "x.pth", "fp32")
    assert path.stat().st_size < 10_000


def test_a_failed_write_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = save_checkpoint(model, tmp_path / "rwkv-3.pth")
    before = path.read_bytes()

    def full_disk(flat, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["rwkv-3.pth"]


def test_unknown_dtype(tmp_path, model):
    with pytest.raises(ValueError, match="int8.*bf16"):
        save_checkpoint(model, tmp_path / "x.pth", "int8")


def test_a_hostile_file_is_refused_and_does_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"emb.weight": Hostile()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(CheckpointError, match=f"{name}: refused.*code"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_raise_one_kind_of_error(tmp_path):
    weights = {f"{i}.weight": torch.randn(40, 50) for i in range(8)}
    whole = save_checkpoint(weights, tmp_path / "rwkv-1.pth", "fp32").read_bytes()
    bad = tmp_path / "bad.pth"
    draw = random.Random(0)
    cut = [whole[:n] for n in range(0, len(whole), 1499)]
    noise = [draw.randbytes(n) for n in range(60)] + [b"\x80\x02" + draw.randbytes(n) for n in range(40)]
    for content in cut + noise:
        bad.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.pth: (damaged|refused)"):
            load_checkpoint(bad)


@pytest.mark.parametrize(
    ("content", "words"),
    [([torch.ones(1)], "holds a list"), ({"state_dict": {}}, "'state_dict' is no tensor"), ({}, "empty")],
)
def test_readable_files_that_are_no_checkpoints(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"x.pth: .*{words}"):
        load_checkpoint(tmp_path / "x.pth")


def test_the_newest_is_found_among_foreign_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="my_pile_stage=1"):
        newest_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        newest_checkpoint(tmp_path / "nowhere")
    for name in ("rwkv-final.pth", "rwkv-v5-x.pth", "rwkv-12.pth.bak", ".rwkv-99.pth.1.tmp", "rwkv.pth", "xrwkv-5.pth"):
        (tmp_path / name).touch()
    (tmp_path / "rwkv-70.pth").mkdir()
    (tmp_path / "rwkv-init.pth").touch()
    assert newest_checkpoint(tmp_path) == (-1, tmp_path / "rwkv-init.pth")
    for n in (2, 10, 9):
        (tmp_path / f"rwkv-{n}.pth").touch()
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "rwkv-10.pth")


def test_initial_weights_repeat_by_seed(tmp_path):
    cfg = TrainConfig(**SMALL, random_seed=3, proj_dir=str(tmp_path / "a"))
    a = load_checkpoint(init_checkpoint(cfg))
    b = load_checkpoint(init_checkpoint(cfg.replace(proj_dir=str(tmp_path / "b"))))
    c = load_checkpoint(init_checkpoint(cfg.replace(proj_dir=str(tmp_path / "c"), random_seed=4)))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["head.weight"], c["head.weight"])
    assert {t.dtype for t in a.values()} == {torch.bfloat16} and (tmp_path / "a" / "rwkv-init.pth").is_file()
    with pytest.raises(ValueError, match="vocab_size=0"):
        init_checkpoint(cfg.replace(vocab_size=0))


def test_of_several_processes_the_first_writes_initial_weights(tmp_path, monkeypatch):
    """Without a seed the others draw their own, and the file must be what the run begins with."""
    cfg = TrainConfig(**SMALL, proj_dir=str(tmp_path), my_pile_stage=0, devices=2)
    monkeypatch.setenv("RANK", "1")
    epoch, path, other = starting_checkpoint(cfg)
    assert (epoch, path) == (-1, tmp_path / "rwkv-init.pth") and not path.exists()
    monkeypatch.setenv("RANK", "0")
    first = starting_checkpoint(cfg)[2]
    assert path.is_file() and {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in other.items()}
    path.unlink()
    monkeypatch.setenv("RANK", "1")
    assert starting_checkpoint(cfg.replace(devices=1))[1].is_file(), "a run of its own"
    assert not torch.equal(first["head.weight"].float(), other["head.weight"].to(first["head.weight"].dtype).float())


def test_where_a_run_starts(tmp_path, model):
    cfg = TrainConfig(**SMALL, proj_dir=str(tmp_path), my_pile_stage=3, magic_prime=389)
    with pytest.raises(FileNotFoundError, match="rwkv-init.pth"):
        starting_checkpoint(cfg)
    for n in ("init", 3, 7):
        save_checkpoint(model, tmp_path / f"rwkv-{n}.pth")
    assert starting_checkpoint(cfg)[:2] == (7, tmp_path / "rwkv-7.pth")
    assert starting_checkpoint(cfg.replace(load_model="0"))[0] == 7, "as the article's script passes it"
    given = starting_checkpoint(cfg.replace(load_model=str(tmp_path / "rwkv-3.pth"), epoch_begin=5))
    assert given[:2] == (4, tmp_path / "rwkv-3.pth"), "an explicit file is not ignored"
    (tmp_path / "rwkv-7.pth").write_bytes((tmp_path / "rwkv-7.pth").read_bytes()[:5000])
    with pytest.warns(UserWarning, match=r"passed over: .*rwkv-7\.pth"):
        assert starting_checkpoint(cfg)[0] == 3
    for n in ("init", 3):
        (tmp_path / f"rwkv-{n}.pth").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        starting_checkpoint(cfg)
