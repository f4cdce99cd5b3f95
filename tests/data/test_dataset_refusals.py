"""What the training data set refuses, with the flag and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_cases import CTX, pair_data, starts, write_pair

from rwkv_nb.data.dataset import TokenDataset
from rwkv_nb.data.tokenizer import WorldTokenizer


@pytest.mark.parametrize(("change", "message"), [
    ({"data_type": "csv"}, "data_type is 'csv'.*binidx"), ({"ctx_len": 0}, "ctx_len is 0"),
    ({"my_pile_stage": 5}, "my_pile_stage is 5"), ({"my_pile_shift": -2}, "my_pile_shift is -2"),
    ({"my_pile_version": 3}, "my_pile_version is 3"), ({"my_qa_mask": 3}, "my_qa_mask is 3"),
    ({"my_qa_mask": 1}, "qa_pile_file is ''"), ({"vocab_size": 0}, "vocab_size is 0.*65536"),
    ({"my_random_steps": -1}, "my_random_steps is -1"), ({"data_file": ""}, "data_file is empty"),
    ({"data_file": "nowhere/data"}, "nowhere/data"), ({"rank": 1}, "rank 1, world_size 1"), ({"seed": -1}, "seed -1"),
    ({"magic_prime": 0}, "magic_prime is 0.*--magic_prime 113"), ({"magic_prime": 111}, "111.*not a prime.*113"),
    ({"magic_prime": 109}, "109 % 3 is 1, not 2"), ({"magic_prime": 131}, "only 125 slots"),
    ({"magic_prime": 113, "ctx_len": 400}, "only 2 slots.*fewer than 3"),
    ({"ctx_len": 1000, "my_pile_stage": 0}, "1000 tokens, too few.*ctx_len 1000.*1001.*below 1000"),
    ({"vocab_size": 700}, "token id .* vocab_size is 700"), ({"my_pile_shift": 104}, "past the end of 1000"),
    ({"data_type": "numpy", "my_qa_mask": 1}, "data_type is 'numpy'.*binidx"),
    ({"data_type": "numpy", "my_pile_version": 2}, "data_type is 'numpy'.*binidx")])
def test_refusals_name_the_flag_and_the_remedy(counting, change, message):
    with pytest.raises(ValueError, match=message):
        pair_data(counting, **change)


def test_prime_equal_to_slots_is_refused_only_where_its_last_window_does_not_fit(tmp_path):
    """5 slots of 8: p = 5 needs token 40, the target of the last window."""
    with pytest.raises(ValueError, match="32 to 41, past the end of 40"):
        pair_data(write_pair(tmp_path / "exact", np.arange(40, dtype=np.uint16)), magic_prime=5)
    data = pair_data(write_pair(tmp_path / "one_more", np.arange(41, dtype=np.uint16)), magic_prime=5)
    assert set(starts(data)) == {0, 8, 16, 24, 32}


def test_missing_mixing_file_is_named(counting):
    with pytest.raises(ValueError, match="no_such_pair"):
        pair_data(counting, my_qa_mask=2, qa_pile_file="no_such_pair")


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros((5, 5), np.uint16), r"shape \(5, 5\)"), (np.zeros(50), "dtype is float64")])
def test_numpy_refusals(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        TokenDataset(data_file=str(tmp_path / "a.npy"), data_type="numpy", vocab_size=9, ctx_len=CTX)


@pytest.mark.parametrize(("name", "content", "data_type", "message"), [
    ("a.npy", b"no array", "numpy", "not a readable .npy"), ("a.txt", b"\xff\xfeabc", "utf-8", "not utf-8.*utf-16le"),
    ("a.txt", b"", "utf-8", "empty"), ("a.txt", b"abc", "utf-16le", "not utf-16le.*utf-8"),
    ("a.bin", b"123456789", "uint16", "9 bytes are no whole number of rows of my_sample_len = 3"),
    ("a.bin", b"", "uint16", "0 bytes"), ("a.txt", b"abc", "utf-8", "3 characters, too few")])
def test_file_refusals(tmp_path, name, content, data_type, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenDataset(data_file=str(tmp_path / name), data_type=data_type, vocab_size=9, ctx_len=CTX, my_sample_len=3)


@pytest.mark.parametrize("data_type", ["numpy", "utf-8", "uint16"])
def test_missing_files_are_named(data_type):
    with pytest.raises(ValueError, match="data_file nowhere.x: no such file"):
        TokenDataset(data_file="nowhere.x", data_type=data_type, vocab_size=9)


def test_rows_longer_than_the_context_are_refused(tmp_path):
    np.zeros(60, np.uint16).tofile(tmp_path / "rows.bin")
    flags = {"data_file": str(tmp_path / "rows.bin"), "data_type": "uint16", "vocab_size": 9}
    with pytest.raises(ValueError, match="my_sample_len is 10.*ctx_len 8"):
        TokenDataset(**flags, my_sample_len=10, ctx_len=8)
    with pytest.raises(ValueError, match="my_sample_len is 0"):
        TokenDataset(**flags, ctx_len=8)


def test_negative_ids_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.full(50, -1))
    with pytest.raises(ValueError, match="token id -1"):
        TokenDataset(data_file=str(tmp_path / "a.npy"), data_type="numpy", vocab_size=9, ctx_len=CTX)


def test_tokenizer_of_the_pair_must_be_that_of_the_model(tmp_path):
    class Other:
        name, sha256, vocab_size = "twenty_b", "0" * 64, 50277

    other = write_pair(tmp_path / "other", np.arange(100, dtype=np.uint16), Other())
    world = write_pair(tmp_path / "world", np.arange(100, dtype=np.uint16), WorldTokenizer())
    flags = {"my_pile_stage": 0, "vocab_size": 65536}
    pair_data(world, **flags)
    with pytest.raises(ValueError, match="twenty_b.*rwkv_vocab_v20230424"):
        pair_data(other, **flags)
    pair_data(other, **flags, tokenizer=Other())
    with pytest.raises(ValueError, match="vocab_size is 50000.*twenty_b.*50277"):
        pair_data(other, my_pile_stage=0, vocab_size=50000)
    with pytest.raises(ValueError, match="rwkv_vocab_v20230424.*twenty_b"):
        pair_data(world, my_pile_stage=0, tokenizer=Other())


def test_small_ratio_is_a_note_not_an_error(counting):
    notes = " ".join(pair_data(counting, magic_prime=113).notes)
    assert "113/125 = 0.904: the official trainer of December 2023 refuses it" in notes and "today's" not in notes
    assert "20 samples, the official one 40320" in notes
    small = " ".join(pair_data(counting, magic_prime=5).notes)
    assert "today's refuses it" in small and "reads each chunk 4.0 times" in small and "--magic_prime 113" in small
    nearly_nothing = pair_data(counting, my_pile_stage=0, ctx_len=400)
    assert "fewer than 3 * ctx_len = 1200" in nearly_nothing.notes[0]
