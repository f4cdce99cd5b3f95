"""The training data set: the walk and random places across ranks, epochs and restarts; configuration, workers."""

from __future__ import annotations

import math
import multiprocessing
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dataset_cases import CTX, official_starts, pair_data, starts, write_pair

from rwkv_nb.data.dataset import DataConfig, TokenDataset
from rwkv_nb.data.magic_prime import magic_prime


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
