"""The training data set: each data type against a computation by hand, the walk across ranks, epochs and restarts."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder
from rwkv_nb.data.dataset import DataConfig, TokenDataset, answer_mask
from rwkv_nb.data.magic_prime import magic_prime
from rwkv_nb.data.tokenizer import WorldTokenizer

CTX = 8


def write_pair(prefix, tokens, tokenizer=None) -> str:
    with MMapIndexedDatasetBuilder(str(prefix), tokenizer=tokenizer) as builder:
        builder.add_item(tokens)
        builder.end_document()
    return str(prefix)


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> str:
    """A pair whose token at position i is i, so that a window tells where it starts. 1000 tokens: p = 113 of 125."""
    return write_pair(tmp_path_factory.mktemp("pair") / "counting", np.arange(1000, dtype=np.uint16))


def pair_data(prefix, **more) -> TokenDataset:
    flags = {"data_file": prefix, "data_type": "binidx", "vocab_size": 1000, "ctx_len": CTX, "epoch_steps": 5,
             "micro_bsz": 4, "my_pile_stage": 3, "magic_prime": 113}
    names = ("rank", "world_size", "seed", "tokenizer")
    return TokenDataset(**{n: more.pop(n) for n in names if n in more}, **{**flags, **more})


def starts(data: TokenDataset) -> list[int]:
    return [int(data[i][0][0]) for i in range(len(data))]


def official_starts(n, p, ctx, epoch=0, rank=0, world=1, per_epoch=20, shift=0, skip=0) -> list[int]:
    factor = int(p * ((math.sqrt(5) - 1) / 2))
    iis = [1 + epoch * per_epoch + i * world + rank - skip for i in range(n)]
    return [factor * ii * ii * ii % p * ctx + shift for ii in iis]


# ---- the walk ----

def test_walk_gives_the_official_windows(counting):
    data = pair_data(counting)
    assert len(data) == 20
    assert starts(data) == official_starts(20, 113, CTX)
    x, y = data[3]
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (CTX,)
    assert torch.equal(y, x + 1)
    assert torch.equal(x, torch.arange(int(x[0]), int(x[0]) + CTX))
    with pytest.raises(IndexError):
        data[20]
    with pytest.raises(IndexError):
        data[-1]


def test_epochs_ranks_and_restarts_make_one_walk(counting):
    whole = official_starts(120, 113, CTX)
    for world in (1, 2, 3):
        ranks = [pair_data(counting, rank=r, world_size=world) for r in range(world)]
        for epoch in range(2):
            for data in ranks:
                data.set_epoch(epoch)
            together = [s for group in zip(*map(starts, ranks), strict=True) for s in group]
            assert together == whole[epoch * 20 * world:(epoch + 1) * 20 * world]
    restarted = pair_data(counting, epoch_begin=2)
    restarted.set_epoch(1)
    assert restarted.real_epoch == 3 and starts(restarted) == whole[60:80]


def test_one_pass_reads_every_chunk_once(counting):
    data = pair_data(counting, epoch_steps=113, micro_bsz=1)
    assert sorted(starts(data)) == [CTX * chunk for chunk in range(113)]


def test_shift_and_random_steps(counting):
    assert starts(pair_data(counting, my_pile_shift=5)) == official_starts(20, 113, CTX, shift=5)
    mixed = starts(pair_data(counting, my_random_steps=8))
    assert mixed[7:] == official_starts(20, 113, CTX, skip=8)[7:]  # ii = 8 is the first that walks, as ii = 0
    assert mixed[:7] != official_starts(20, 113, CTX)[:7] and mixed[7] == 0


def test_large_numbers_do_not_overflow(tmp_path):
    prefix = write_pair(tmp_path / "many", np.zeros(3_000_001, dtype=np.uint16))
    prime = magic_prime(3_000_001, 1)
    data = pair_data(prefix, ctx_len=1, magic_prime=prime, epoch_begin=10**6, epoch_steps=40320, micro_bsz=1)
    place = data.sampler.place(data.real_epoch, 7)
    ii = 1 + 10**6 * 40320 + 7
    assert ii**3 > 2**63
    assert place.start == int(prime * ((math.sqrt(5) - 1) / 2)) * pow(ii, 3, prime) % prime


# ---- random places ----

@pytest.mark.parametrize("stage", [0, 4])
def test_random_places_depend_on_seed_epoch_rank_and_index_alone(counting, stage):
    def draw(epoch=0, **more):
        data = pair_data(counting, my_pile_stage=stage, **more)
        data.set_epoch(epoch)
        return starts(data)

    np.random.seed(1)
    first = draw()
    np.random.seed(2)
    assert draw() == first and len(set(first)) > 10
    assert draw(epoch=1) == draw(epoch_begin=1)
    others = [first, draw(seed=1), draw(epoch=1), draw(rank=1, world_size=2)]
    assert len({tuple(o) for o in others}) == 4
    assert draw(rank=0, world_size=2) == first


def test_random_places_reach_both_ends_and_no_further(tmp_path):
    prefix = write_pair(tmp_path / "short", np.arange(12, dtype=np.uint16))
    data = pair_data(prefix, my_pile_stage=0, epoch_steps=60)
    assert set(starts(data)) == {0, 1, 2, 3}


# ---- the other data types ----

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


# ---- question and answer mixing ----

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


# ---- refusals, each with its reason ----

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


# ---- description, configuration, workers ----

def test_description_tells_size_and_coverage(counting):
    text = pair_data(counting, world_size=2, epoch_begin=3).describe()
    assert "1000 tokens" in text and "113 of 125 slots" in text and "90.40%" in text and "2.83 mini-epochs" in text
    assert "5 steps x 4 samples x 2 ranks = 40 samples, now number 3" in text and "note: " in text
    assert "random, 992 possible starts" in pair_data(counting, my_pile_stage=4).describe()


def test_configuration_from_flags_and_both_forms(counting):
    flags = SimpleNamespace(data_file=counting, data_type="binidx", vocab_size=1000, ctx_len=CTX, n_layer=12, lr_init=1)
    config = DataConfig.from_flags(flags)
    assert config == DataConfig(data_file=counting, data_type="binidx", vocab_size=1000, ctx_len=CTX)
    assert len(TokenDataset(config)) == 12000
    with pytest.raises(ValueError, match="not both: ctx_len"):
        TokenDataset(config, ctx_len=4)


@pytest.mark.parametrize("data_type", ["binidx", "numpy", "utf-8", "uint16"])
def test_pickle_carries_paths_not_tokens(tmp_path, data_type):
    n = 400_000
    path = tmp_path / "data"
    flags = {"data_file": str(path), "data_type": data_type, "vocab_size": 128, "ctx_len": CTX, "my_sample_len": 8}
    tokens = np.random.default_rng(0).integers(65, 91, n).astype(np.uint16)
    if data_type == "binidx":
        write_pair(path, tokens)
    elif data_type == "numpy":
        with open(path, "wb") as file:
            np.save(file, tokens)
    else:
        path.write_bytes(tokens.tobytes() if data_type == "uint16" else tokens.astype(np.uint8).tobytes())
    data = TokenDataset(**flags)
    pickled = pickle.dumps(data)
    assert len(pickled) < 20_000
    again = pickle.loads(pickled)
    assert all(torch.equal(again[i][0], data[i][0]) for i in range(20))


@pytest.mark.parametrize("method", [m for m in ("spawn", "fork") if m in multiprocessing.get_all_start_methods()])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_living_workers_see_the_epoch(counting, method):
    data = pair_data(counting)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True,
                                         multiprocessing_context=multiprocessing.get_context(method))
    whole = official_starts(40, 113, CTX)
    for epoch in range(2):
        data.set_epoch(epoch)
        batches = [x[:, 0].tolist() for x, _ in loader]
        assert sum(batches, []) == whole[20 * epoch:20 * (epoch + 1)]
    del loader


def test_windows_are_copies(counting):
    data = pair_data(counting)
    x, y = data[0]
    x.fill_(7)
    assert not (y[:-1] == 7).any() and data[0][0][0] != 7
