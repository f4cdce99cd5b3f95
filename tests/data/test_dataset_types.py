"""Every data type of the training data set against a computation by hand; mixing with questions and answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from dataset_cases import CTX, official_starts, pair_data, starts, write_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data.dataset import TokenDataset, answer_mask
from rwkv_nb.data.magic_prime import magic_prime


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16le"])
@pytest.mark.parametrize("stage", [0, 3])
def test_text_by_character(tmp_path, encoding, stage):
    text = "Ein Kreis ist rund, ein Würfel nicht. 今天是美好的一天。🦅\n" * 6
    path = tmp_path / "text.txt"
    path.write_text(text, encoding=encoding)
    data = TokenDataset(data_file=str(path), data_type=encoding, ctx_len=CTX, epoch_steps=10, micro_bsz=2,
                        my_pile_stage=stage, magic_prime=magic_prime(len(text), CTX), proj_dir=str(tmp_path / "out"))
    chars = sorted(set(text))
    assert data.vocab_size == len(chars) and data.n_tokens == len(text)
    for i in range(20):
        x, y = data[i]
        window = "".join(chars[t] for t in x) + chars[y[-1]]
        assert torch.equal(x[1:], y[:-1]) and window in text
        if stage == 3:
            start = official_starts(20, data.config.magic_prime, CTX)[i]
            assert window == text[start:start + CTX + 1]
    written = json.loads((tmp_path / "out" / "vocab.json").read_text(encoding="utf-8"))
    assert written == {str(i): char for i, char in enumerate(chars)}


def test_vocab_json_is_written_by_rank_0_and_only_where_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abcdefgh" * 9)
    flags = {"data_file": "text.txt", "data_type": "utf-8", "ctx_len": CTX}
    TokenDataset(**flags)
    TokenDataset(**flags, proj_dir="out", rank=1, world_size=2)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_numpy_array(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(500, dtype=np.int32))
    data = TokenDataset(data_file=str(path), data_type="numpy", vocab_size=500, ctx_len=CTX, epoch_steps=5,
                        micro_bsz=4, my_pile_stage=2, magic_prime=59)
    assert starts(data) == official_starts(20, 59, CTX)
    assert isinstance(data.source.tokens, np.memmap)


@pytest.mark.parametrize("stage", [0, 3])
def test_uint16_rows(tmp_path, stage):
    path = tmp_path / "rows.bin"
    rows = np.arange(60, dtype=np.uint16).reshape(12, 5)
    rows.tofile(path)
    data = TokenDataset(data_file=str(path), data_type="uint16", vocab_size=60, ctx_len=CTX, my_sample_len=5,
                        epoch_steps=30, micro_bsz=4, my_pile_stage=stage)
    seen = set()
    for i in range(len(data)):
        x, y = data[i]
        row = int(x[0]) // 5
        assert x.tolist() == rows[row, :-1].tolist() and y.tolist() == rows[row, 1:].tolist()
        seen.add(row)
    assert seen == set(range(12))  # the last row too


def test_dummy_sums():
    data = TokenDataset(data_type="dummy", ctx_len=40, epoch_steps=5, micro_bsz=1)
    assert data.source.tokenizer.chars == tuple("+.0123456789=")
    text = data.source.tokenizer.decode(data.source.tokens[:40].tolist())
    assert text == ".0+0=0..1+1=2..2+4=6..3+9=12..4+16=20..5"
    sample = data.source.tokenizer.decode(data[0][0].tolist())
    a, rest = sample.split("..", 1)[1].split("+")[:2]
    assert int(a) + int(rest.split("=")[0]) == int(rest.split("=")[1].split(".")[0])
    assert data.source.n_tokens == sum(len(f".{i % 10000}+{i * i % 10000}={i % 10000 + i * i % 10000}.")
                                       for i in range(100000))


def test_list_of_pairs(tmp_path):
    """Two pairs of 100 and 60 tokens at ctx_len 8: 92 and 52 starts; the second has weight 104, so twice over."""
    one = write_pair(tmp_path / "one", np.arange(100, dtype=np.uint16))
    two = write_pair(tmp_path / "two", np.arange(200, 260, dtype=np.uint16))
    listing = tmp_path / "list.txt"
    listing.write_text(f"{one} 92 92\n{two} 52 0.5 196\n")
    data = pair_data(str(listing), my_pile_version=2, magic_prime=23)
    assert data.n_tokens == 196
    expected = [s if s < 92 else 200 + (s - 92) % 52 for s in official_starts(20, 23, CTX)]
    assert starts(data) == expected and max(expected) >= 200 > min(expected)
    everywhere = set(starts(pair_data(str(listing), my_pile_version=2, my_pile_stage=0, epoch_steps=500)))
    assert everywhere == set(range(92)) | set(range(200, 252))


@pytest.mark.parametrize(("line", "message"), [
    ("{one} 91 92", "must be their difference, 92"), ("{one} x 92", "is not `prefix chunks cutoff`"),
    ("{one} 92", "is not `prefix chunks cutoff`"), ("{one} 92 92\n{one} 92 92", "line 2: cutoff is 92"),
    ("{one}x 92 92", "onex")])
def test_list_of_pairs_says_what_is_wrong(tmp_path, line, message):
    one = write_pair(tmp_path / "one", np.arange(100, dtype=np.uint16))
    (tmp_path / "list.txt").write_text(line.format(one=one))
    with pytest.raises(ValueError, match=message):
        pair_data(str(tmp_path / "list.txt"), my_pile_version=2, magic_prime=5)


def qa_pairs(tmp_path, with_answers=True) -> dict:
    user = np.arange(300, 700, dtype=np.uint16)
    if with_answers:
        user[4::16], user[5::16], user[6::16], user[7::16] = 187, 187, 34, 27
        user[13::16] = 0
    return {"data_file": write_pair(tmp_path / "user", user), "vocab_size": 1000, "ctx_len": 16,
            "qa_pile_file": write_pair(tmp_path / "general", np.arange(800, 990, dtype=np.uint16)),
            "data_type": "binidx", "magic_prime": 23, "my_pile_stage": 3, "epoch_steps": 5, "micro_bsz": 4}


@pytest.mark.parametrize("qa_mask", [1, 2])
def test_qa_mask_alternates_between_general_text_and_the_users(tmp_path, qa_mask):
    data = TokenDataset(**qa_pairs(tmp_path), my_qa_mask=qa_mask)
    user = np.asarray(data.source.tokens)
    factor = int(23 * ((math.sqrt(5) - 1) / 2))
    for i in range(20):
        sample = data[i]
        x, ii = sample[0], i + 1
        assert len(sample) == (3 if qa_mask == 1 else 2)
        if ii % 2 == 0:
            assert x.min() >= 800
            assert qa_mask == 2 or bool((sample[2] == 1).all())
        else:
            start = factor * (ii // 2) ** 3 % 23 * 16
            assert x.tolist() == user[start:start + 16].tolist()
            if qa_mask == 1:  # an answer begins with its 27 at 7 and lasts to the one before the 0 at 13
                assert sample[2].tolist() == [float(7 <= j < 13) for j in range(16)]
                assert sample[2].dtype == torch.float32


def test_qa_mask_replaces_a_window_without_answer(tmp_path):
    data = TokenDataset(**qa_pairs(tmp_path, with_answers=False), my_qa_mask=1)
    for i in range(20):
        x, y, mask = data[i]
        assert x.min() >= 800 and bool((mask == 1).all()) and torch.equal(y, x + 1)


@given(ids=st.lists(st.sampled_from([0, 187, 34, 27, 5]), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_answer_mask_is_that_of_the_official_loop(ids):
    z, good = [0] * len(ids), False
    for i in range(3, len(ids)):
        if ids[i] == 27 and ids[i - 1] == 34 and ids[i - 2] == 187 and ids[i - 3] == 187:
            good = True
        if ids[i] == 0:
            good = False
        z[i] = int(good)
    assert answer_mask(torch.tensor(ids)).tolist() == z
