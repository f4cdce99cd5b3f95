"""A seeded sample of benchmarks/fuzz.py; what its runs have found, case by case; and that it finds what it should."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_nb import __main__ as door
from rwkv_nb.data.binidx import BinidxError, MMapIndexedDataset, MMapIndexedDatasetBuilder
from rwkv_nb.data.characters import CharTokenizer
from rwkv_nb.inference.engine import read_config
from rwkv_nb.inference.strategy import StrategyError, parse_strategy
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.weights import load_weights
from rwkv_nb.training import cli
from rwkv_nb.training.checkpoint import load_checkpoint
from rwkv_nb.training.config import ConfigError

pytest.importorskip("resource", reason="the benchmark limits its memory by it: not on Windows")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
WEIGHTS = init_weights(ModelConfig(2, 32, 11, head_size_a=32), seed=0)


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("fuzz")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products on many threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SUBJECTS = ("tokenizer", "vocabulary file", "vocab.json", "binidx", "jsonl", "checkpoints", "other checkpoints",
            "hostile pickles", "strategies", "flags of train", "flags of generate", "flags of make_data")  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_sample(fuzz, subject, tmp_path):
    cases = fuzz.SUBJECTS[subject][2]
    result = fuzz.run(subject, cases, 2026, tmp_path)
    assert not result.findings, result.findings[0]
    assert result.outcomes.total() == cases
    assert set(result.outcomes) <= {"right", "refused"} and result.outcomes["refused"] > cases // 20


def test_no_subject_is_left_out(fuzz):
    assert set(fuzz.SUBJECTS) == set(SUBJECTS)
    assert sum(cases for _, cases, _ in fuzz.SUBJECTS.values()) >= 100_000


def test_wrong_results_crashes_silence_and_hangs_are_findings(fuzz, tmp_path, monkeypatch):
    from fuzzers import Wrong, refusal

    def crash(draw):
        raise KeyError("x")

    def wrong(draw):
        raise Wrong("other ids")

    def hang(draw):
        while True:
            pass

    monkeypatch.setattr(fuzz, "TOO_LONG", 1)
    bad = {"crash": crash, "wrong": wrong, "silent": lambda draw: refusal(ValueError("x")), "hang": hang}
    for name, case in bad.items():
        monkeypatch.setitem(fuzz.SUBJECTS, name, (lambda folder, case=case: case, 1, 1))
        [finding] = fuzz.run(name, 1, 7, tmp_path).findings
        assert finding.startswith(f"{name}:7:0: ")


def test_a_damaged_module_is_found(fuzz, tmp_path, monkeypatch):
    """The reader of pairs without its look at the pointers: the benchmark must notice."""
    monkeypatch.setattr(MMapIndexedDataset, "_check_pointers", lambda self: None)
    findings = fuzz.run("binidx", 200, 2026, tmp_path).findings
    assert findings and any("a bad pair is taken" in finding for finding in findings)


# ---- what was found


def rezipped(path, change):
    """Members changed, with checksums that agree."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, change(name, data))


@pytest.mark.parametrize("read", [RWKV.from_checkpoint, load_weights, read_config, load_checkpoint])
def test_a_flipped_bit_in_a_weight_is_not_read_as_another_number(tmp_path, read):
    path = tmp_path / "rwkv-1.pth"
    torch.save(WEIGHTS, path)
    data = bytearray(path.read_bytes())
    at = bytes(data).index(WEIGHTS["blocks.1.ffn.key.weight"].numpy().tobytes()[:64])
    data[at + 30] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rwkv-1\.pth: .*wrong checksum"):
        read(path)


@pytest.mark.parametrize("read", [load_weights, load_checkpoint])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_tensor_larger_than_its_file_is_not_filled_with_what_lies_in_memory(tmp_path, read, mapped):
    path = tmp_path / "rwkv-1.pth"
    torch.save({"a": torch.arange(5.0)}, path)
    rezipped(path, lambda name, data: data.replace(b"K\x05\x85", b"M\x00\x70\x85") if name.endswith("pkl") else data)
    options = {"mmap": True} if mapped and read is load_weights else {}
    with pytest.raises(ValueError, match=r"rwkv-1\.pth: "):
        read(path, **options)


@pytest.mark.parametrize("value", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2, device="meta"),
                                   torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)])  # fmt: skip
@pytest.mark.parametrize("read", [load_weights, load_checkpoint])
def test_tensors_that_are_not_plain_numbers(tmp_path, read, value):
    torch.save({"a": value}, tmp_path / "rwkv-1.pth")
    with pytest.raises(ValueError, match=r"rwkv-1\.pth: "):
        read(tmp_path / "rwkv-1.pth")


def test_names_and_numbers_that_no_model_has(tmp_path):
    path = tmp_path / "rwkv-1.pth"
    torch.save({**WEIGHTS, 3: torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no dictionary of named tensors"):
        RWKV.from_checkpoint(path)
    torch.save({**WEIGHTS, "blocks.1.att.output.weight": torch.zeros(32, 32, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match=r"blocks\.1\.att\.output\.weight holds int64, not decimal numbers"):
        RWKV.from_checkpoint(path)
    torch.save({name: x for name, x in WEIGHTS.items() if name != "head.weight"}, path)
    assert read_config(path).vocab_size == 11  # the sizes are there; what is missing is said by whoever loads it
    with pytest.raises(ValueError, match="missing keys: head.weight"):
        RWKV.from_checkpoint(path)


def test_brackets_within_brackets(tmp_path):
    (tmp_path / "vocab.json").write_text('{"0":' * 100_000)
    with pytest.raises(ValueError, match="not a character vocabulary"):
        CharTokenizer.load(tmp_path / "vocab.json")
    with MMapIndexedDatasetBuilder(tmp_path / "pair") as builder:
        builder.add_item([1, 2, 3])
    (tmp_path / "pair.meta.json").write_text("[" * 100_000)
    with pytest.raises(BinidxError, match="meta.json: content is not JSON"):
        MMapIndexedDataset(tmp_path / "pair")


@pytest.mark.parametrize("text", ["cpu fp32 *" + "9" * 5000, "cuda:٣ fp16", "cpu fp32 *٣", "cpu fp32 *²"])
def test_counts_and_devices_in_plain_digits_of_a_plain_length(text):
    with pytest.raises(StrategyError, match="character"):
        parse_strategy(text, 12)
    assert parse_strategy("cpu fp32 *" + "0" * 20 + "3 -> cpu bf16", 4).entries[0].count == 3


def said(capsys, *argv):
    """Exit code and what was complained of, in one line each."""
    code = door.main(list(argv))
    return code, capsys.readouterr().err


def test_numbers_that_are_none(tmp_path):
    good = {"data_file": tmp_path / "text.txt", "accelerator": "cpu", "proj_dir": tmp_path / "run"}
    (tmp_path / "text.txt").write_text("the eagle " * 500)
    for flag in ("lr_init", "lr_final", "weight_decay", "weight_decay_final", "adam_eps", "save_minutes", "dropout"):
        for value in ("nan", "inf", "1e400"):
            argv = [f"--{name}={value}" for name, value in {**good, flag: value}.items()]
            with pytest.raises(ConfigError, match=f"{flag}=(nan|inf): must be"):
                cli.check(argv)


def test_a_value_that_argparse_makes_a_list_of(tmp_path, capsys):
    for words in ("train --n_layer=--", "generate --tokenizer=--", "make_data x 1 4 --out=--"):
        code, err = said(capsys, *words.split())
        assert code == 2 and "'--' is no value" in err
    with pytest.raises(ConfigError, match="n_layer='--': expected a whole number"):
        cli.check(["--n_layer=--"])


def test_a_folder_with_a_name_too_long_and_a_seed_too_large(tmp_path, capsys):
    code, err = said(capsys, "train", "--proj_dir", "9" * 5000)
    assert code == 2 and "--proj_dir 999" in err and "name another folder" in err and len(err) < 2000
    torch.save(init_weights(ModelConfig(2, 32, 26, head_size_a=32), seed=0), tmp_path / "a.pth")
    CharTokenizer("abcdefghijklmnopqrstuvwxyz").save(tmp_path / "vocab.json")
    argv = ["generate", "--model", str(tmp_path / "a.pth"), "--prompt", "a", "--n_tokens", "1"]
    code, err = said(capsys, *argv, "--seed", "-99999999999999999999")
    assert code == 1 and "--seed -99999999999999999999: must be a whole number that fits into 64 bits" in err


def test_the_marker_of_a_hostile_file_can_appear(fuzz, tmp_path):
    """The proof that the fuzzer's files would run their code if they were trusted."""
    from fuzzers.checkpoints import Call, pickled

    attack = pickled({"emb.weight": Call("os.system", f"touch {tmp_path / 'marker'}")}, 2)
    pickle.loads(attack)
    assert (tmp_path / "marker").exists()
    assert os.listdir(tmp_path) == ["marker"]
