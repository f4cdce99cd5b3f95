"""What is checked before a run begins: flags against each other, against data, devices and packages."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from cli_cases import World, problems, words, write_data

from rwkv_nb.training import cli, preflight
from rwkv_nb.training.config import TrainConfig


def test_a_good_run_has_no_problems(base):
    cfg, notes = cli.check(words(base))
    assert cfg == TrainConfig(**base) and notes == []
    assert set(os.listdir()) == {"text.bin", "text.idx"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data_file": "text.bin"}, "--data_file text.bin: give the name that .bin and .idx share, text"),
        ({"data_file": "data/minipile"}, "--data_file data/minipile: data/minipile.bin and data/minipile.idx missing; "
                                         "download it: python -m rwkv_nb download minipile"),
        ({"data_file": "x/minipile"}, "python -m rwkv_nb download minipile --to x"),
        ({"data_file": "nope"}, "python -m rwkv_nb make_data IN.jsonl 1 16 --out nope"),
        ({"data_file": ""}, "--data_file '': name the data"),
        ({"data_type": "utf-8", "data_file": "no.txt", "vocab_size": 0}, "--data_file no.txt: no such file"),
        ({"ctx_len": 3000}, "3000 tokens, too few for one window of ctx_len 3000"),
        ({"ctx_len": 1500, "my_pile_stage": 1}, "--magic_prime 0: none exists for ctx_len=1500"),
        ({"magic_prime": 185, "my_pile_stage": 1}, "--magic_prime 185: magic_prime is 185, which is not a prime"),
        ({"magic_prime": 191, "my_pile_stage": 1}, "--magic_prime 191: magic_prime is 191, but 3000 tokens have"),
        ({"vocab_size": 300}, "--vocab_size 300: the data holds token 300"),
        ({"vocab_size": 0}, "--vocab_size 0: only text is counted by itself"),
        ({"micro_bsz": 11, "my_pile_stage": 1}, "--micro_bsz 11 (num_nodes * devices * micro_bsz = 11): does not "
                                                "divide the 40320 samples of a mini-epoch (stages 1 to 4); the nearest "
                                                "batch sizes that work are 10 and 12"),
        ({"my_pile_stage": 3}, "--proj_dir run: no rwkv-init.pth or rwkv-N.pth to start from"),
        ({"load_model": "no.pth"}, "--load_model no.pth: no such file"),
        ({"proj_dir": "text.bin/run"}, "text.bin is a file"),
        ({"accelerator": "gpu"}, "--accelerator gpu: no GPU is visible here; use --accelerator cpu"),
        ({"accelerator": "mps"}, "--accelerator mps: that is the GPU of an Apple processor, and here is none"),
        ({"strategy": "ddp_notebook"}, "--strategy ddp_notebook: copies a running program, data and all; use ddp"),
        ({"strategy": "deepspeed_stage_2", "devices": 2}, "--strategy deepspeed_stage_2: needs GPUs"),
        ({"wandb": "eagle"}, "--wandb eagle: the package wandb is not installed; pip install -e '.[gpu]'"),
        ({"logger": "tensorboard"}, "--logger tensorboard: the package tensorboard is not installed"),
        ({"n_embd": 96}, "--head_size_a 64: dim_att=96 is not a multiple of it"),
    ],
)  # fmt: skip
def test_every_check_names_flag_value_and_remedy(base, changes, expected, monkeypatch):
    monkeypatch.setattr(preflight, "installed", lambda package: "")
    monkeypatch.setattr(preflight.sys, "platform", "linux")
    found = problems({**base, **changes})
    assert any(expected in line for line in found), found
    assert len(found) == 1, found
    assert set(os.listdir()) == {"text.bin", "text.idx"}


def test_what_torch_gets_wrong_with_pieces_in_ram_is_refused():
    cfg = TrainConfig(strategy="fsdp_cpu_offload", accelerator="gpu", precision="bf16", n_layer=2, n_embd=64,
                      vocab_size=64, ctx_len=16, my_pile_stage=0, proj_dir="run")  # fmt: skip
    assert cfg.problems() == []
    for flag, value in {"accumulate_grad_batches": 2, "precision": "fp16"}.items():
        [problem] = cfg.replace(**{flag: value}).problems()
        assert problem.startswith(f"{flag}={value}: with strategy='fsdp_cpu_offload' torch") and "use " in problem
        assert cfg.replace(**{flag: value}, strategy="fsdp").problems() == []


def test_a_vocabulary_that_is_not_the_tokenizers(base):
    write_data("world", tokenizer=World)
    assert problems({**base, "data_file": "world", "vocab_size": 50277}) == [
        "--vocab_size 50277: rwkv_vocab_v20230424 made the data, with 65536 tokens; use 65536"]  # fmt: skip
    assert "use 65536, as rwkv_vocab" in problems({**base, "data_file": "world", "vocab_size": 0})[0]

    class Other(World):
        name, sha256 = "20B", "0" * 64

    write_data("other", tokenizer=Other)
    assert "20B" in problems({**base, "data_file": "other"})[0]


def test_text_is_counted_and_checked(base):
    Path("a.txt").write_text("abcde\n" * 20, encoding="utf-8")
    text = {**base, "data_type": "utf-8", "data_file": "a.txt", "vocab_size": 0}
    assert cli.check(words(text))[0].vocab_size == 6
    assert cli.check(words({**text, "vocab_size": 100}))[0].vocab_size == 100
    said = "--vocab_size 5: the text has 6 different characters; use 6, or 0 to count"
    assert problems({**text, "vocab_size": 5}) == [said]
    Path("b.txt").write_bytes(b"\xff" * 100)
    assert "not utf-8" in problems({**text, "data_file": "b.txt"})[0]


def test_the_highest_token_of_large_data_is_looked_for_in_many_places(monkeypatch):
    monkeypatch.setattr(preflight, "SCANNED", 1600)
    tokens = np.zeros(100_000, np.uint16)
    tokens[-1] = 7
    assert preflight._highest(tokens) == 7
    tokens[50] = 9
    assert preflight._highest(tokens) == 9


def test_all_mistakes_in_one_message(base, capsys):
    flags = {**base, "micro_bsz": 11, "my_pile_stage": 3, "data_file": "nope", "precision": "half", "n_embd": 100}
    assert cli.main(words(flags)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("python -m rwkv_nb train: nothing was started or written\n")
    named = re.findall(r"^  --(\w+) ", err, re.MULTILINE)
    assert sorted(named) == ["data_file", "micro_bsz", "n_embd", "precision", "proj_dir"], "and no magic_prime"
    assert set(os.listdir()) == {"text.bin", "text.idx"}


def test_the_prime_is_computed_and_said(base):
    cfg, notes = cli.check(words({**base, "my_pile_stage": 1}))
    assert cfg.magic_prime == 179 and notes == ["magic_prime: 179, computed from 3000 tokens"]
    larger = [n for n in range(180, 3000 // 16) if n % 3 == 2 and all(n % d for d in range(2, n))]
    assert larger == []


@pytest.mark.parametrize(
    ("accelerator", "strategy", "has_deepspeed", "gpus", "outcome"),
    [
        ("cpu", "deepspeed_stage_2", "", 0, "DeepSpeed needs GPUs"),
        ("cpu", "deepspeed_stage_3_offload", "0.15", 0, "DeepSpeed needs GPUs"),
        ("auto", "deepspeed_stage_2", "", 0, "DeepSpeed needs GPUs"),
        ("gpu", "deepspeed_stage_2", "", 1, "one device has nothing to divide"),
        ("gpu", "deepspeed_stage_2", "0.15", 1, None),
        ("gpu", "deepspeed_stage_3", "", 1, "the package deepspeed is not installed"),
    ],
)
def test_deepspeed_on_one_device(base, monkeypatch, accelerator, strategy, has_deepspeed, gpus, outcome):
    monkeypatch.setattr(preflight, "installed", lambda package: has_deepspeed)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: gpus)
    flags = {**base, "accelerator": accelerator, "strategy": strategy}
    if outcome is not None and "package" in outcome:
        [problem] = problems(flags)
        assert outcome in problem and "pip install -e '.[gpu]', or use --strategy fsdp" in problem
        return
    cfg, notes = cli.check(words(flags))
    assert cfg.strategy == (strategy if outcome is None else "auto")
    assert (notes == []) if outcome is None else (outcome in notes[0] and strategy in notes[0])


def test_more_devices_than_there_are(base, monkeypatch):
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 2)
    assert problems({**base, "accelerator": "gpu", "devices": 4}) == [
        "--devices 4: 2 GPU(s) visible here; use at most so many"]  # fmt: skip
    monkeypatch.setattr(preflight, "visible_gpus", lambda: None)
    assert cli.check(words({**base, "accelerator": "gpu", "devices": 4}))[0].devices == 4, "not known: left to torch"


def test_only_the_first_process_speaks(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    two = TrainConfig(devices=2)
    for names, first in [
        ("", True), ("LOCAL_RANK=1", False), ("LOCAL_RANK=1 RANK=0", True), ("LOCAL_RANK=0 RANK=8", False),
        ("NODE_RANK=1", False), ("NODE_RANK=1 LOCAL_RANK=0", False), ("NODE_RANK=0 LOCAL_RANK=0", True),
        ("SLURM_PROCID=0", True), ("SLURM_PROCID=3", False), ("SLURM_PROCID=0 LOCAL_RANK=1", False),
        ("JSM_NAMESPACE_RANK=2", False),
    ]:  # fmt: skip
        with monkeypatch.context() as patch:
            for name, _, value in (word.partition("=") for word in names.split()):
                patch.setenv(name, value)
            assert cli.first_process(two) == first, names
            assert cli.first_process(TrainConfig()), "a run on one device, one of many that were started together"
