"""The magic prime and the cubic walk, against trial division, brute force and the official numbers."""

from __future__ import annotations

from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_nb.data import magic_prime as mp
from rwkv_nb.data.binidx import MMapIndexedDatasetBuilder

MINIPILE = 1498226207
SMALL_PRIMES = [n for n in range(2, 400) if all(n % d for d in range(2, n))]


def by_trial(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def official_loop(n_tokens: int, ctx_len: int) -> int | None:
    """The loop of make_data.py, as it stands there."""
    if n_tokens >= ctx_len * 3:
        for i in range(n_tokens // ctx_len - 1, 0, -1):
            if i % 3 == 2 and by_trial(i):
                return i
    return None


def test_primality_agrees_with_trial_division_and_known_large_numbers():
    assert [n for n in range(-3, 2000) if mp.is_prime(n)] == [n for n in range(2000) if by_trial(n)]
    assert mp.is_prime(2**61 - 1) and mp.is_prime(2**521 - 1)
    assert not mp.is_prime((2**61 - 1) * (2**89 - 1))
    assert not any(mp.is_prime(n) for n in (561, 341550071728321, 3215031751))  # they fool Fermat, or a few bases
    assert mp.is_prime(np.int64(7)) is True


@pytest.mark.parametrize("bad", [7.0, "7", None, 2.5])
def test_primality_refuses_what_is_no_integer(bad):
    with pytest.raises(ValueError, match="must be an integer"):
        mp.is_prime(bad)


@pytest.mark.parametrize(("ctx_len", "prime"), [
    (128, 11704859), (256, 5852423), (512, 2926181), (1024, 1463027), (2048, 731531), (4096, 365759), (8192, 182867)])
def test_golden_primes_of_minipile(ctx_len, prime):
    assert mp.magic_prime(MINIPILE, ctx_len) == prime


def test_golden_primes_of_the_pile_and_of_the_official_demo():
    assert mp.magic_prime(332115325534, 4096) == 81082817
    assert mp.magic_prime(332115325534, 1024) == 324331313
    primes = {64: 3119, 128: 1559, 256: 773, 512: 389, 1024: 191, 2048: 89, 4096: 47}
    assert {ctx: mp.magic_prime(200499, ctx) for ctx in primes} == primes


@given(n_tokens=st.integers(0, 20000), ctx_len=st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_prime_is_that_of_the_official_loop(n_tokens, ctx_len):
    assert mp.magic_prime(n_tokens, ctx_len) == official_loop(n_tokens, ctx_len)


def test_none_exactly_below_three_windows():
    for ctx_len in (1, 5, 512):
        assert mp.magic_prime(3 * ctx_len - 1, ctx_len) is None
        assert mp.magic_prime(3 * ctx_len, ctx_len) == 2


@pytest.mark.parametrize("exponent", [70, 120, 200])
def test_prime_of_data_beyond_any_machine_integer(exponent):
    slots = 2**exponent
    prime = mp.magic_prime(slots * 512 + 17, 512)
    assert prime % 3 == 2 and prime < slots and mp.is_prime(prime)
    between = range(prime + 3, slots, 3)
    assert all(n % 2 == 0 or pow(3, n - 1, n) != 1 for n in between)  # Fermat's test proves them composite


@pytest.mark.parametrize(("n_tokens", "ctx_len"), [(100, 0), (100, -1), (-1, 4), (100.0, 4), (100, 4.0)])
def test_prime_refuses_impossible_sizes(n_tokens, ctx_len):
    with pytest.raises(ValueError, match="n_tokens|ctx_len"):
        mp.magic_prime(n_tokens, ctx_len)


def test_explain_says_what_official_trainers_do():
    demo = mp.explain(200499, 4096)
    assert (demo.slots, demo.prime, demo.mini_epochs) == (48, 47, 0)
    assert demo.ratio == 47 / 48 and not demo.accepted_2023 and demo.accepted_today
    assert "December 2023" in str(demo) and "857.9 times" in str(demo)
    large = mp.explain(MINIPILE, 512)
    assert large.accepted_2023 and large.accepted_today and large.mini_epochs == 72 and large.reason == ""
    assert large.flags == "--my_exit_tokens 1498226207 --magic_prime 2926181 --ctx_len 512"
    assert "note" not in str(large)
    tiny = mp.explain(10 * 64, 64)  # 5 of 10 slots
    assert (tiny.prime, tiny.ratio, tiny.accepted_today) == (5, 0.5, False)
    assert "0.99 and 0.9" in str(tiny)


def test_explain_says_why_there_is_no_prime():
    none = mp.explain(100, 64)
    assert none.prime is None and none.flags == "" and not none.accepted_today
    assert "fewer than 3 * ctx_len = 192" in str(none) and "ctx_len 33 or less" in none.reason
    assert mp.magic_prime(100, 33) is not None and mp.magic_prime(100, 34) is None
    assert "more data" in mp.explain(2, 64).reason


def test_golden_offsets_of_minipile():
    offsets = [mp.sample_offset(2926181, 512, 0, i, 0, 1) for i in range(5)]
    assert offsets == [925941248, 1414711296, 1029138944, 830257664, 380896256]
    assert mp.sample_offset(2926181, 512, 1, 0, 0, 1) == 631271424
    assert mp.golden_factor(2926181) == 1808479


@given(prime=st.sampled_from([p for p in SMALL_PRIMES if p % 3 == 2]), start=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_walk_visits_every_chunk_once_from_any_start(prime, start):
    assert sorted(mp.chunk_of(prime, ii) for ii in range(start, start + prime)) == list(range(prime))


@pytest.mark.parametrize("prime", [p for p in SMALL_PRIMES if p % 3 == 1])
def test_walk_of_a_prime_with_remainder_one_misses_two_thirds(prime):
    chunks = [mp.chunk_of(prime, ii) for ii in range(1, prime + 1)]
    assert len(set(chunks)) == 1 + (prime - 1) // 3
    assert all(chunks.count(c) == (1 if c == 0 else 3) for c in set(chunks))


@given(prime=st.sampled_from([47, 89, 389]), world_size=st.integers(1, 8), per_rank=st.integers(1, 40),
       epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_ranks_share_out_the_walk_of_one_process(prime, world_size, per_rank, epoch):
    per_epoch = world_size * per_rank
    alone = [mp.sample_offset(prime, 8, epoch, i, 0, 1, per_epoch) for i in range(per_epoch)]
    for rank in range(world_size):
        mine = [mp.sample_offset(prime, 8, epoch, i, rank, world_size, per_epoch) for i in range(per_rank)]
        assert mine == alone[rank::world_size]


def test_epochs_continue_the_walk():
    long = [mp.sample_offset(389, 4, 0, i, 0, 1, 60) for i in range(60)]
    short = [mp.sample_offset(389, 4, epoch, i, 0, 1, 20) for epoch in range(3) for i in range(20)]
    assert short == long


def test_offsets_beyond_64_bits_are_exact():
    prime, ii = 81082817, 1 + 2000 * 40320 + 3 * 8 + 5
    factor = (isqrt(5 * prime * prime) - prime) // 2  # the exact floor; below 2**53 float64 finds the same
    assert factor == mp.golden_factor(prime)
    residue = factor % prime
    for _ in range(3):
        residue = residue * (ii % prime) % prime  # every product below 2**63
    assert factor * ii**3 > 2**63
    assert mp.sample_offset(prime, 4096, 2000, 3, 5, 8) == residue * 4096
    as_numpy = mp.sample_offset(np.int64(prime), np.int32(4096), np.int64(2000), np.int64(3), np.int32(5), np.int64(8))
    assert as_numpy == residue * 4096 and type(as_numpy) is int


def test_factor_beyond_53_bits_is_float64s_and_still_permutes():
    from fractions import Fraction
    from math import sqrt

    prime = mp.magic_prime(2**70, 1)
    golden = (sqrt(5) - 1) / 2
    exact_product = Fraction(golden) * prime
    factor = mp.golden_factor(prime)
    assert factor == int(float(prime) * golden) != int(exact_product)
    assert 0 < factor < prime  # so f is invertible mod p, and f * ii**3 permutes
    assert abs(factor - exact_product) <= exact_product * Fraction(1, 2**52)


@pytest.mark.parametrize("bad", [
    {"rank": 2}, {"rank": -1}, {"world_size": 0}, {"epoch": -1}, {"idx": -1}, {"samples_per_epoch": 0}, {"prime": 1},
    {"ctx_len": 0}, {"epoch": 0.5}])
def test_offset_refuses_impossible_arguments(bad):
    good = {"prime": 47, "ctx_len": 4, "epoch": 0, "idx": 0, "rank": 0, "world_size": 2}
    mp.sample_offset(**good)
    with pytest.raises(ValueError, match=next(iter(bad))):
        mp.sample_offset(**{**good, **bad})


def test_command_prints_the_prime_alone_for_scripts(capsys):
    assert mp.main(["1498226207", "512"]) == 0
    out, err = capsys.readouterr()
    assert out == "2926181\n" and "2926181 for ctx_len 512" in err and "72 whole mini-epochs" in err
    assert mp.main(["1498226207", "512", "--flags"]) == 0
    assert capsys.readouterr().out == "--my_exit_tokens 1498226207 --magic_prime 2926181 --ctx_len 512\n"


def test_command_counts_the_tokens_of_a_pair(tmp_path, capsys):
    with MMapIndexedDatasetBuilder(tmp_path / "x", dtype=np.uint16) as builder:
        builder.add_item(np.arange(100, dtype=np.uint16))
        builder.end_document()
    assert mp.main([str(tmp_path / "x"), "8"]) == 0
    assert capsys.readouterr().out == "11\n", "100 // 8 - 1 = 11 is prime, and 2 more than a multiple of 3"
    with pytest.raises(ValueError, match="use ctx_len 33 or less"):
        mp.main([str(tmp_path / "x"), "40"])
    with pytest.raises(ValueError, match=r"nothing\.idx: file is missing"):
        mp.main([str(tmp_path / "nothing"), "8"])
