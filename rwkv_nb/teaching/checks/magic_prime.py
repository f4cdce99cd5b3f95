"""Checks of notebook 03: the magic prime, the way back from a chunk, the ranks' shares, 64 bits without overflow."""

from __future__ import annotations

import numpy as np

from rwkv_nb.data import magic_prime as truth
from rwkv_nb.teaching.checks import exercise, require

MINIPILE = 2926181


def _integer(value: object, call: str) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(whole, f"{call} gave {value!r}; an integer was expected. Is there a / where // belongs, or no return?")
    return int(value)


@exercise("3.1", "The magic prime", minutes=10, difficulty=2)
def magic_prime(answer):
    """answer(n_tokens, ctx_len) -> int or None."""

    def at_10(n_tokens: int) -> int:
        return _integer(answer(n_tokens, 10), f"magic_prime({n_tokens}, 10)")

    found = at_10(210)  # 21 slots: 20 is 3k + 2 but even, 19 is prime but 3k + 1
    where = f"magic_prime(210, 10) gave {found}:"
    require(found <= 21, f"{where} but there are only 21 slots. Did you divide n_tokens by ctx_len?")
    require(truth.is_prime(found), f"{where} that is not a prime number. Is the test for primes there?")
    require(found % 3 == 2, f"{where} its remainder by 3 is {found % 3}. Did you forget the condition p % 3 == 2?")
    require(found == 17, f"{where} a larger one exists. Do you search downwards and stop at the first hit?")
    for n_tokens, right in ((240, 23), (120, 11)):
        require(at_10(n_tokens) == right, f"magic_prime({n_tokens}, 10) should be slots - 1 = {right} itself, you gave "
                                          f"{at_10(n_tokens)}. Is the first candidate skipped?")
    require(at_10(230) != 23, "magic_prime(230, 10): 23 slots and p = 23 would need token 231 as the last target. Did "
                              "you start at slots in place of slots - 1?")
    require(at_10(239) != 23, "magic_prime(239, 10): the last 9 tokens fill no slot. Did you round up?")
    for n_tokens, ctx_len in ((29, 10), (100, 64), (2, 1)):
        found = answer(n_tokens, ctx_len)
        require(found is None, f"magic_prime({n_tokens}, {ctx_len}) gave {found!r}: fewer than 3 * ctx_len tokens "
                               "have no magic prime. Return None there.")
    found = answer(30, 10)
    require(found == 2, f"magic_prime(30, 10) gave {found!r}: it is 2, the only even prime. Does your search stop "
                        "before 2, or your test call it composite?")
    found = answer(1498226207, 512)
    require(found == MINIPILE, f"minipile at ctx_len 512: the answer is {MINIPILE}, yours is {found!r}.")
    return f"and it finds minipile's {MINIPILE}."


@exercise("3.2", "When is this chunk read?", minutes=12, difficulty=3)
def when_visited(answer):
    """answer(chunk, p) -> the ii in 1..p with f * ii**3 % p == chunk."""
    for p in (47, 389):
        order = [truth.chunk_of(p, ii) for ii in range(1, p + 1)]  # the truth: by walking the whole way
        for chunk in (order[0], order[1], order[p - 2], 1, p - 1, p // 2, 0):
            found, right = _integer(answer(chunk, p), f"when_visited({chunk}, {p})"), order.index(chunk) + 1
            if found == right:
                continue
            d, f_inverse = (2 * p - 1) // 3, pow(truth.golden_factor(p), -1, p)
            root = pow(chunk, d, p)
            require(chunk != 0, "Chunk 0 comes up when ii is a multiple of p. Numbers start at 1, so in the first "
                                f"pass that is ii = p = {p}, not {found}.")
            require(found != truth.chunk_of(p, chunk), "You walked forward: that is what sample number `chunk` reads. "
                                                       "Here you need the way back.")
            require(found != root, "You undid the cubing but not the factor: chunk is f * ii**3, so divide by f first "
                                   "(multiply by pow(f, -1, p)).")
            require(found != root * f_inverse % p, "The order matters: first divide by f, then take the cube root. "
                                                   "You did it the other way round.")
            require(found != chunk * f_inverse % p, "You divided by f. What is left is ii**3 mod p: take its cube root "
                                                    "with the exponent d.")
            require(False, f"p = {p}: chunk {chunk} is read as sample {right}, yours is {found}. Is your exponent "
                           "d = (2 * p - 1) // 3?")
    for ii in (5, 2000003):
        chunk = truth.chunk_of(MINIPILE, ii)
        found = _integer(answer(chunk, MINIPILE), f"when_visited({chunk}, {MINIPILE})")
        require(found == ii, f"It works for small p; for p = {MINIPILE} chunk {chunk} is read as sample {ii}, yours is "
                             f"{found}. Do floats or numpy's 64 bits get in?")
    return "without walking a step."


@exercise("3.3", "One walk, many GPUs", minutes=8, difficulty=2)
def numbers_of_rank(answer):
    """answer(epoch, rank, world_size, samples_per_epoch) -> list of the ii that this rank reads in this mini-epoch."""
    first, second = list(answer(0, 0, 1, 6)), list(answer(1, 0, 1, 6))
    require(first != [0, 1, 2, 3, 4, 5], "Sample numbers start at 1, not at 0.")
    require(first == [1, 2, 3, 4, 5, 6], f"One GPU, first mini-epoch of 6 samples: 1 to 6 in order; yours is {first}.")
    require(second != first, "The second mini-epoch reads the same samples as the first: does the epoch enter?")
    require(second == [7, 8, 9, 10, 11, 12],
            f"One GPU, second mini-epoch of 6: it goes on where the first ended, 7 to 12; yours is {second}.")
    ranks = [list(answer(0, rank, 3, 12)) for rank in range(3)]
    require(len(ranks[0]) != 12, "3 GPUs, 12 samples a mini-epoch: each rank reads 4 of them, yours reads 12. "
                                 "samples_per_epoch counts all ranks together.")
    require(ranks[0] != [1, 2, 3, 4], "Ranks take turns: rank 0 of 3 reads 1, 4, 7, 10. Yours cuts the mini-epoch into "
                                      "blocks, so a step's batch over all ranks is no stretch of the walk.")
    require(sorted(sum(ranks, [])) == list(range(1, 13)), f"Together 3 ranks must read 1 to 12, each once: {ranks}.")
    require(ranks == [[1, 4, 7, 10], [2, 5, 8, 11], [3, 6, 9, 12]],
            f"Rank r starts at 1 + r and steps by the world size; yours read {ranks}.")
    last = list(answer(2, 3, 4, 8))
    require(last == [20, 24], f"Third mini-epoch, rank 3 of 4, 8 samples: 20 and 24; yours is {last}. Does an epoch "
                              "advance by samples_per_epoch, whatever the world size?")
    return "the ranks never speak, and never meet."


@exercise("3.4", "The walk in 64 bits", minutes=12, difficulty=3)
def chunks_int64(answer):
    """answer(p, ii int64 array) -> int64 array of chunks, exact for p < 2**31 and any ii below 2**62."""

    def right(p: int, numbers: np.ndarray) -> bool:
        return answer(p, numbers).tolist() == [truth.chunk_of(p, ii) for ii in numbers.tolist()]

    numbers = np.arange(1, 48, dtype=np.int64)
    found = answer(47, numbers)
    require(isinstance(found, np.ndarray) and found.shape == numbers.shape,
            f"The answer should be an array of shape {numbers.shape}, one chunk for each number.")
    require(numbers[-1] == 47 and numbers[0] == 1,
            "Your function changed the array it was given: ii = ii % p makes a new array, ii %= p does not.")
    require(found.dtype == np.int64, f"The dtype is {found.dtype}. Stay in int64: no floats, no Python objects.")
    require(right(47, numbers), "Wrong already for p = 47, where nothing overflows: is it f * ii**3 % p?")
    reduce = "Reduce mod p after every multiplication."
    require(right(MINIPILE, np.arange(17000, 17500, dtype=np.int64)),
            f"p = {MINIPILE}, numbers around 17200: wrong. f * ii**3 passes 2**63 there. {reduce}")
    require(right(MINIPILE, np.arange(2097000, 2097300, dtype=np.int64)),
            f"p = {MINIPILE}, numbers around 2097152: wrong. ii**3 alone passes 2**63 there. {reduce}")
    require(right(MINIPILE, np.array([4 * 10**9, 2**61 + 7], dtype=np.int64)),
            "Wrong for ii of four thousand million: ii**2 alone passes 2**63 there. Reduce ii itself first.")
    p = 2147483579  # the largest prime 3k + 2 below 2**31
    require(right(p, np.array([p - 1, p - 2, 2**40 + 1], dtype=np.int64)),
            f"p = {p}, just below 2**31: wrong. A product of two residues fits 63 bits, a product of three does not.")
    return "exact to the last bit, at numpy's speed."
