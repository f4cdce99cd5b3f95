"""Checks of notebook 05: a forward kernel, the gradient of u, the boundary of a chunk, the backward pass's traffic.

The kernel is run by the emulator (`rwkv_nb.wkv.emulator`), which needs a C++ compiler; the others are plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_nb.teaching.checks import exercise, require
from rwkv_nb.teaching.checks.kernel_runs import run_answer
from rwkv_nb.wkv import emulated, emulator, wkv5_reference

N = 16  # channels of a head, in all checks of kernels
SINGLE = "With B = H = 1, step t of channel i lies at t N + i."
SEVERAL = ("Here time is the axis before the last: the next step of a head lies N numbers further, and block n begins "
           "at n T N. For w and u it is h N.")  # fmt: skip


def _draw(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _near(found: Tensor, right: Tensor, tolerance: float = 1e-6) -> bool:
    found, right = found.double(), right.double()
    return bool(((found - right).abs() <= tolerance * (1e-3 + right.abs().max())).all())  # NaN is not near


def _require(found: Tensor, right: Tensor, otherwise: str, *mistakes: tuple[Tensor, str], tolerance: float = 1e-6):
    """Stop with the message of the first mistake that gives the same result, or with `otherwise` if not near right."""
    for wrong, message in mistakes:
        require(_near(wrong, right, tolerance) or not _near(found, wrong, tolerance), message)
    require(_near(found, right, tolerance), otherwise)


@exercise("5.1", "A forward kernel", minutes=25, difficulty=4)
def forward_kernel(source):
    """source: text of `template <int N> my_wkv(T, H, r, k, v, w, u, y)`, r, k, v, y of shape (B, H, T, N)."""
    require(isinstance(source, str), "Hand in the text of the kernel.")
    if "your turn" in source:
        raise NotImplementedError
    require(emulated.why_not() is None, f"This check runs your kernel by emulation, which {emulated.why_not()}.")

    def run(schedule: str = "in order", **given: Tensor) -> emulator.Report:
        inputs = {name: given[name].float().contiguous() for name in "rkvwu"}
        B, H, T, _ = inputs["r"].shape
        arguments = {"T": T, "H": H, **inputs, "y": torch.full((B, H, T, N), torch.nan)}
        launch = emulator.Launch(f"my_wkv<{N}>", B * H, N, arguments)
        report = run_answer(source, launch, schedule, SINGLE if B == H == 1 else SEVERAL)
        require(not report["y"].isnan().any(),
                "Some elements of y were never written (or are NaN). Each thread writes one element in every step.")
        return report

    def one(**given: Tensor) -> Tensor:  # y (T, N) of a single head
        return run(**{n: x[None, None] if n in "rkv" else x[None] for n, x in given.items()})["y"][0, 0]

    r, k, v, w, u = _draw((3, N), (3, N), (3, N), (N,), (N,), seed=1)
    zero, d = torch.zeros(N), torch.exp(-torch.exp(w))
    kv = torch.outer(k[0], v[0])
    where = "One step, one head, an empty state:"
    _require(
        one(r=r[:1], k=k[:1], v=v[:1], w=w, u=u)[0], r[0] @ (u[:, None] * kv),
        f"{where} y[i] should be sum over j of r[j] u[j] k[j] v[i].",
        (zero, f"{where} y is zero. The bonus u k v is missing: a step reads its own pair."),
        (r[0] @ ((1 + u[:, None]) * kv),
         f"{where} the pair is read twice, with 1 and with u. You update the state before you read it."),
        (r[0] @ kv, f"{where} the pair is read with weight 1 in place of u[j]."),
        (r[0] @ (u * kv), f"{where} you multiply by u[i]. The bonus belongs to the key channel j."),
        tolerance=1e-5,
    )  # fmt: skip
    first_only = torch.cat([k[:1], torch.zeros(2, N)])  # one pair, stored at step 0, read at steps 1 and 2
    y = one(r=r, k=first_only, v=v, w=w, u=zero)
    where = "A single pair, stored in step 0 and read in step 1:"
    _require(
        y[1], r[1] @ kv, f"{where} y[i] should be sum over j of r[j] k[j] v[i].",
        (r[1] @ (d[:, None] * kv), f"{where} it has faded already. The decay comes first, then the new pair is added."),
        (zero, f"{where} y is zero. Is the pair added to the state?"),
        tolerance=1e-5,
    )  # fmt: skip
    where = "The same pair, read in step 2:"
    others = ((torch.exp(-w), "exp(-w)"), (torch.exp(w), "exp(w)"), (w, "w itself"))
    _require(
        y[2], r[2] @ (d[:, None] * kv), f"{where} y[i] should be sum over j of r[j] d[j] k[j] v[i].",
        (r[2] @ (d[:, None] ** 2 * kv), f"{where} it has faded twice. One decay in each step."),
        (r[2] @ kv, f"{where} it has not faded. S becomes d[j] S + k v."),
        (r[2] @ (d * kv), f"{where} you decay by d[i]. The decay belongs to the key channel j."),
        *((r[2] @ (x[:, None] * kv), f"{where} you decay by {name}. d = exp(-exp(w)).") for x, name in others),
        tolerance=1e-5,
    )  # fmt: skip
    for B, H, T in ((1, 1, 9), (1, 3, 5), (2, 3, 7)):
        r, k, v, w, u = _draw(*[(B, H, T, N)] * 3, (H, N), (H, N), seed=2)
        report = run(r=r, k=k, v=v, w=w, u=u)
        right, _ = wkv5_reference(*(x.transpose(1, 2) for x in (r, k, v)), w, u)
        hint = "Do you use this step's r and k?" if H == 1 else f"Where does block n find its head? {SEVERAL}"
        require(_near(report["y"], right.transpose(1, 2), 1e-5),
                f"B, H, T = {B}, {H}, {T}: wrong, though smaller cases are right. {hint}")
    backwards = run("reversed", r=r, k=k, v=v, w=w, u=u)
    require(torch.equal(backwards["y"], report["y"]), "The result depends on the order in which threads run.")
    barriers = report.barriers["my_wkv"]
    return f"equal to the float64 loop, and no race: {barriers} barriers for {B * H} blocks of {T} steps."


@exercise("5.2", "The gradient of u", minutes=10, difficulty=2)
def gradient_of_u(answer):
    """answer(r, k, v, gy), each (B, T, H, N) -> gu (H, N)."""
    B, T, H, n = 2, 5, 3, 4

    def run(*args: Tensor) -> Tensor:
        gu = answer(*args)
        require(isinstance(gu, Tensor), f"Return a tensor, not {type(gu).__name__}.")
        return gu

    r, k, v, gy = _draw(*[(B, T, H, n)] * 4, seed=5)
    each = r * k * (v * gy).sum(-1, keepdim=True)
    gu = run(*(x[:1, :1] for x in (r, k, v, gy)))  # one step of one text: the sums over b and t do nothing
    require(gu.dim() != 4, "u is the same for all texts and steps: sum over both. gu has shape (H, N).")
    require(tuple(gu.shape) == (H, n), f"gu should have shape (H, N) = {(H, n)}, yours has {tuple(gu.shape)}.")
    a, b, c, g = (x[0, 0] for x in (r, k, v, gy))
    dot, where = (c * g).sum(-1, keepdim=True), "One step:"
    _require(
        gu, a * b * dot, f"{where} gu[j] should be r[j] k[j] (v · gy).",
        (a * b * c * g, f"{where} you multiply v and gy entry by entry. u[j] meets every v[i]: sum over i."),
        ((a * b).sum(-1, keepdim=True) * c * g,
         f"{where} you sum over the keys and keep the values. u belongs to the keys: sum over i, keep j."),
        (b * dot, f"{where} r[j] is missing."),
        (a * dot, f"{where} k[j] is missing."),
        (-a * b * dot, f"{where} the sign is wrong."),
    )  # fmt: skip
    gu = run(r, k, v, gy)
    _require(
        gu, each.sum((0, 1)), "Right for a single step. Do you sum over all steps and all texts?",
        (each.mean((0, 1)), "You average over texts and steps. Gradients add up."),
        (r.sum((0, 1)) * k.sum((0, 1)) * (v * gy).sum((0, 1, 3))[:, None],
         "You sum r, k and v · gy over the steps before multiplying. Multiply inside each step."),
    )  # fmt: skip
    w, u = _draw((H, n), (H, n), seed=6)
    u.requires_grad_()
    y, _ = wkv5_reference(r, k, v, w, u)
    require(_near(gu, torch.autograd.grad((y * gy).sum(), u)[0]), "That is not what autograd says.")
    return "autograd says the same."


@exercise("5.3", "Across a chunk", minutes=15, difficulty=3)
def chunk_boundary(carry, carry_back):
    """carry(k, v, w, S) -> the state after the chunk; carry_back(r, gy, w, Q) -> the gradient of that before it."""
    L, n = 5, 3
    r, k, v, gy = _draw(*[(L, n)] * 4, seed=7)
    S, Q = _draw((n, n), (n, n), seed=8)
    w = torch.tensor([-2.0, 0.0, 0.7], dtype=torch.float64)
    d, nothing, empty = torch.exp(-torch.exp(w))[:, None], torch.zeros_like(r), torch.zeros_like(S)

    def run(function, *args: Tensor) -> Tensor:
        out, name = function(*args), function.__name__
        require(isinstance(out, Tensor) and tuple(out.shape) == (n, n), f"{name} should return one (N, N) tensor.")
        require(bool(torch.isfinite(out).all()),
                f"{name} gave inf or NaN. A negative power of d overflows: keep every exponent at 0 or above.")
        return out

    def only(x: Tensor, step: int) -> Tensor:
        return torch.where(torch.arange(L)[:, None] == step, x, 0.0)

    where = f"carry, with k = 0 (nothing new) and {L} steps:"
    _require(
        run(carry, nothing, v, w, S), d**L * S, f"{where} the state should be d^L S, row by row.",
        (S, f"{where} the old state has not faded."),
        (d * S, f"{where} the old state has faded for one step only."),
        (d ** (L - 1) * S, f"{where} you take d^(L-1). The old state fades in each of the L steps."),
        (d**16 * S, f"{where} you take d^16. A chunk may be shorter: L is len(k)."),
        (d.T**L * S, f"{where} the decay belongs to the rows: one d for each key channel."),
    )  # fmt: skip
    for s in reversed(range(L)):  # one pair at a time; the last one first: it has not faded
        pair, where = torch.outer(k[s], v[s]), f"carry, an empty state and a single pair in step {s} of {L}:"
        _require(
            run(carry, only(k, s), v, w, empty), d ** (L - 1 - s) * pair,
            f"{where} it should have faded L - 1 - s = {L - 1 - s} times.",
            (d ** (L - 1 - s) * pair.T, f"{where} the pair is stored as [value, key]."),
            (d ** (L - s) * pair, f"{where} it has faded L - s times. Its own step does not fade it."),
            (d**s * pair, f"{where} you take d^s. A late pair has faded less than an early one."),
            (pair, f"{where} it has not faded. How many steps of the chunk come after it?"),
        )  # fmt: skip
    where = f"carry_back, with r = 0 (nothing is read) and {L} steps:"
    _require(
        run(carry_back, nothing, gy, w, Q), d**L * Q, f"{where} the gradient should be d^L Q, row by row.",
        (Q / d**L, f"{where} you divide by d^L. Backwards, too, every step multiplies by d."),
        (d ** (L - 1) * Q, f"{where} you take d^(L-1). The state fades in each of the L steps."),
    )  # fmt: skip
    for t in range(L):
        pair, where = torch.outer(r[t], gy[t]), f"carry_back, Q = 0 and a single reading in step {t} of {L}:"
        _require(
            run(carry_back, only(r, t), gy, w, empty), d**t * pair,
            f"{where} it should be d^{t} times the outer product of r and gy.",
            (d ** (L - 1 - t) * pair,
             f"{where} you take d^(L-1-t), as for pairs. Step t reads what has faded t times."),
            (d ** (t + 1) * pair, f"{where} you take d^(t+1). A step reads before it fades."),
        )  # fmt: skip
    strong = torch.tensor([4.0, 0.0, 3.0], dtype=torch.float64)
    for decay, times in ((w, 1), (strong, 40)):  # 200 steps of strong decay: powers down to zero
        r2, k2, v2, gy2 = (x.repeat(times, 1) for x in (r, k, v, gy))
        start = S.clone().requires_grad_()
        y, last = wkv5_reference(*(x[None, :, None] for x in (r2, k2, v2)), decay[None], w[None], start[None, None])
        before = torch.autograd.grad((y[0, :, 0] * gy2).sum() + (last[0, 0] * Q).sum(), start)[0]
        strength = "strong" if times > 1 else "mild"
        where = f"wrong for {len(r2)} steps, with a {strength} decay, though its parts are right."
        require(_near(run(carry, k2, v2, decay, S), last[0, 0]), f"carry: {where}")
        require(_near(run(carry_back, r2, gy2, decay, Q), before), f"carry_back: {where}")
    return "with these two and the pairs inside, a chunk is complete."


@exercise("5.4", "The traffic of the backward pass", minutes=15, difficulty=3)
def backward_numbers(answer):
    """answer(B, T, H, N) -> numbers that the four gradient kernels read and write in arrays with a T, and in states."""
    answer(1, 1, 1, N)  # a stub is open, whatever this machine has
    require(emulated.why_not() is None, f"This check counts by emulation, which {emulated.why_not()}.")
    for B, T, H in ((1, 1, 1), (1, 3, 1), (2, 5, 3)):
        r, k, v, gy, w, u = _draw(*[(B, T, H, N)] * 4, (H, N), (H, N), dtype=torch.float32)
        counts = emulated.run(None, r, k, v, w, u, gy=gy).counts
        moved = {"timed": 0, "states": 0}
        for arrays in (arrays for kernel, arrays in counts.items() if kernel.startswith("wkv5_backward")):
            for name, count in arrays.items():
                kind = "timed" if name in ("r", "k", "v", "gy", "gr", "gk", "gv") else "states"
                if count.space == "global" and (kind == "timed" or name in ("state", "glast", "gstate")):
                    moved[kind] += count.reads + count.writes
        timed, states = moved.values()
        found, each, matrix = answer(B, T, H, N), B * T * H * N, B * H * N * N
        where = f"B, T, H, N = {B}, {T}, {H}, {N}: {found} is not what the emulator counts."
        require(found != 4 * (timed + states), f"{where} You give bytes; numbers were asked for.")
        require(found != timed, f"{where} The states are missing: who reads state and glast, who writes gstate?")
        require(found != states, f"{where} The arrays with a T are missing.")
        require(found != 7 * each + 3 * matrix,
                f"{where} You count each array once. But several kernels read r, k, v and gy, and each time counts.")
        require(found % (B * H) == 0, f"{where} Every head of every text costs the same, so B H divides the number.")
        require(found == timed + states,
                f"{where} Its count is {timed + states}. Go through the four lists of arguments, array by array.")
    return f"{timed // each} times B T H N, {states // matrix} times B H N N. To move each array once takes 7 and 3."
