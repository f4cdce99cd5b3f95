"""How much memory, time and money a training run takes, before it is started: arithmetic, nothing is run.

    plan = plan_run(TrainConfig(n_layer=32, n_embd=4096, strategy="deepspeed_stage_3", ...), GPUS["H100 SXM"])
    plan.memory.total, plan.fits, plan.tokens_per_second, plan.hours, plan.cost

It is: pure functions of a configuration and of assumptions, each an argument with a name. It is not: a measurement.
Memory of parameters, gradients and Adam is exact; activations are a count of what this model keeps for its backward
pass, to about a quarter; throughput rests on `utilisation`, which the runs of `REPORTED` put between a quarter and a
half for the largest model and at a tenth for the smallest. Not included: the CUDA context (0.5 to 1 GB) and what an
allocator leaves unused (plan for a tenth more).

Symbols: P parameters, n devices, B micro_bsz, T ctx_len, L n_layer, D n_embd, A dim_att, F dim_ffn, N head size, V
vocabulary. GB = 10^9 bytes.
Sources: ZeRO, arXiv 1910.02054, section 3 (16 bytes a parameter, and which of them each stage cuts); data sheets of
NVIDIA (dense bfloat16 rates); the runs of `REPORTED` (infctx-trainer's notebook, and our own, benchmarks/RESULTS.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_nb.model.config import WORLD_SIZES as SIZES
from rwkv_nb.model.config import ModelConfig

if TYPE_CHECKING:
    from rwkv_nb.training.config import TrainConfig

GB = 1e9
# bytes that a block keeps for its backward pass, for each token: (a channel of D, a channel of F); counted on the model
# but for 4 of the 8.5: the float32 in which CUDA's autocast takes a square, as a processor's does not
KEPT = {"float32": (94, 8), "bfloat16": (68, 8.5)}
KEPT_FUSED = {"float32": (74, 4), "bfloat16": (48, 2.5)}  # on a processor with a C++ compiler: see model/fused.py
ADAM = 8  # bytes a parameter: two float32 averages
SLICED = 1 << 25  # numbers of the logits in memory at a time: model.loss works in slices


@dataclass(frozen=True)
class Device:
    """peak: multiplications and additions a second in bfloat16 with float32 sums, dense; memory in bytes."""

    name: str
    peak: float
    memory: float


GPUS = {
    d.name: d
    for d in (
        Device("T4 (fp16)", 65e12, 16 * GB),
        Device("RTX 4090", 165e12, 24 * GB),
        Device("A100 PCIe 80", 312e12, 80 * GB),
        Device("A100 SXM 80", 312e12, 80 * GB),
        Device("H100 PCIe", 756e12, 80 * GB),
        Device("H100 SXM", 989e12, 80 * GB),
        Device("H200 SXM", 989e12, 141 * GB),
    )
}


@dataclass(frozen=True)
class Report:
    """A run that somebody measured: tokens a second on each GPU. who: their name, and what they ran."""

    size: str
    device: str
    tokens_per_second: float
    who: str

    @property
    def utilisation(self) -> float:
        return self.tokens_per_second * train_flops(model_of(self.size)) / GPUS[self.device].peak


_INFCTX = "infctx-trainer, notebook 7B-8x80GB, 8 GPUs"
REPORTED = (
    Report("7B", "H100 SXM", 7000, _INFCTX),
    Report("7B", "H100 PCIe", 4200, _INFCTX),
    Report("7B", "A100 SXM 80", 3000, _INFCTX),
    Report("7B", "A100 PCIe 80", 2600, _INFCTX),
    Report("0.1B", "H200 SXM", 109_000, "this course, 1 GPU, 101 to 117 thousand"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; `host`: bytes of RAM for each device, with a strategy that ends in _offload."""

    weights: float
    copies: float  # bfloat16 copies of matrices made by autocast, or layers gathered from the other devices
    gradients: float
    adam: float
    activations: float
    logits: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.copies + self.gradients + self.adam + self.activations + self.logits

    def parts(self) -> dict[str, float]:
        """Name -> bytes, in the order of a stacked bar."""
        names = ("weights", "copies", "gradients", "adam", "activations", "logits")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Plan:
    memory: Memory
    device: Device
    devices: int
    tokens_per_second: float  # of all devices together
    tokens: float
    price_per_hour: float  # of one device

    @property
    def fits(self) -> bool:
        return self.memory.total <= 0.9 * self.device.memory

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600

    @property
    def cost(self) -> float:
        return self.hours * self.devices * self.price_per_hour


def model_of(size: str, ctx_len: int = 4096) -> ModelConfig:
    """The sizes of an official World model by its name in SIZES."""
    n_layer, n_embd = SIZES[size]
    return ModelConfig(n_layer=n_layer, n_embd=n_embd, vocab_size=65536, ctx_len=ctx_len)


def usual_utilisation(config: ModelConfig) -> float:
    """What `REPORTED` suggests: 0.1 for the narrow 0.1B model, whose many small operations leave a GPU waiting; else
    0.3, as measured at 7B. Between the two nobody has told us."""
    return 0.1 if config.n_embd < 1024 else 0.3


def train_flops(config: ModelConfig, grad_cp: bool = False) -> float:
    """Multiplications and additions for one token, forward and backward.

    A matrix of p numbers costs 2 p forward and 4 p backward; the embedding is looked up, not multiplied. WKV costs
    4 A N a layer forward, twice that backward. grad_cp computes the blocks' forward pass once more.
    """
    c = config
    head = c.vocab_size * c.n_embd
    blocks = 2 * (c.n_params - 2 * head) + 4 * c.n_layer * c.dim_att * c.head_size_a
    return (4 if grad_cp else 3) * blocks + 3 * 2 * head


def state_bytes(
    n_params: int, strategy: str = "ddp", devices: int = 1, precision: str = "bf16", accumulate: int = 1
) -> Memory:
    """What does not depend on the batch: weights, gradients, Adam. 16 bytes a parameter in each strategy, cut or not.

    auto, ddp: weights, gradients and Adam in float32, 4 + 4 + 8, whole on each device.
    deepspeed: weights and gradients in 2 bytes (float32: 4), Adam with float32 weights of its own 12; stage 1 cuts
    Adam into one piece a device, stage 2 gradients too, stage 3 weights too. fsdp: like ddp, everything cut.
    accumulate above 1: deepspeed adds up batches in float32, so that gradients take 4 bytes where it cuts them. Stage 1
    has the sum whole beside the gradients of one batch; stage 2 with offload has its piece of the sum on the device.
    """
    P, n = n_params, devices
    if strategy.startswith("fsdp"):
        if "offload" in strategy:
            return Memory(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 16 * P / n)
        return Memory(4 * P / n, 0.0, 4 * P / n, ADAM * P / n, 0.0, 0.0)
    if not strategy.startswith("deepspeed"):
        return Memory(4 * P, 0.0, 4 * P, ADAM * P, 0.0, 0.0)
    stage = next((int(c) for c in strategy if c.isdigit()), 2)
    each = 2 if precision in ("bf16", "fp16") else 4
    adam = (ADAM + (4 if each == 2 else 0)) * P / (n if stage >= 1 else 1)
    gradients = each * P / (n if stage >= 2 else 1)
    summed = accumulate > 1 and each == 2
    if summed:
        gradients = 4 * P / n if stage >= 2 else (4 + each) * P
    weights = each * P / (n if stage >= 3 else 1)
    if "offload" not in strategy:
        return Memory(weights, 0.0, gradients, adam, 0.0, 0.0)
    host = adam + (gradients if stage >= 2 else 0.0) + (weights if stage == 3 else 0.0)
    there = 0.0 if stage == 3 or (stage == 2 and not summed) else gradients
    return Memory(0.0 if stage == 3 else weights, 0.0, there, 0.0, 0.0, 0.0, host)


def activation_bytes(
    config: ModelConfig, micro_bsz: int, ctx_len: int, precision: str = "bf16", grad_cp: bool = False,
    fused: bool = False,
) -> float:  # fmt: skip
    """What the blocks keep for the backward pass. grad_cp: one float32 number a channel, and one whole block.

    fused: on a processor, with a C++ compiler.
    """
    a_channel, of_ffn = (KEPT_FUSED if fused else KEPT)["bfloat16" if precision in ("bf16", "fp16") else "float32"]
    tokens = micro_bsz * ctx_len
    block = tokens * (a_channel * config.n_embd + of_ffn * config.dim_ffn)
    if grad_cp:
        return config.n_layer * tokens * 4 * config.n_embd + block
    return config.n_layer * block


def memory(
    config: ModelConfig, micro_bsz: int, ctx_len: int, strategy: str = "ddp", devices: int = 1,
    precision: str = "bf16", grad_cp: bool = False, logits_whole: bool | None = None, fused: bool = False,
    accumulate: int = 1,
) -> Memory:  # fmt: skip
    """Peak bytes on each of `devices` while training; before, none holds more, as what is cut is cut on its way there.

    accumulate: accumulate_grad_batches.
    logits_whole: logits and their gradient are held entirely, as in the official trainer. None: as this trainer does
    it, in slices but for ZeRO stage 3. fused: see `activation_bytes`.
    """
    each = 2 if precision in ("bf16", "fp16") else 4
    state = state_bytes(config.n_params, strategy, devices, precision, accumulate)
    copies, matrix = 0.0, config.vocab_size * config.n_embd
    if each == 2 and not strategy.startswith(("deepspeed", "fsdp")):
        copies += 2 * (config.n_params - matrix)  # all that is multiplied
    if strategy.startswith("deepspeed_stage_3") and devices > 1:
        copies += 2 * each * matrix  # the largest matrices, whole while they are used
    elif strategy.startswith("fsdp") and (devices > 1 or each == 2 or "offload" in strategy):
        # emb, head and block 0 for the whole step, the others in turn
        at_once = 2 * matrix + (config.n_params - 2 * matrix) * min(3, config.n_layer) / config.n_layer
        copies += 2 * each * at_once  # weights and gradients; one block is fetched while another is worked off
    numbers = micro_bsz * ctx_len * config.vocab_size
    whole = strategy.startswith("deepspeed_stage_3") if logits_whole is None else logits_whole
    if not whole:
        numbers = min(numbers, SLICED)
    return Memory(
        state.weights, copies, state.gradients, state.adam,
        activation_bytes(config, micro_bsz, ctx_len, precision, grad_cp, fused), 2 * each * numbers, state.host,
    )  # fmt: skip


def tokens_per_second(
    config: ModelConfig, device: Device, devices: int = 1, utilisation: float | None = None, scaling: float = 0.9,
    grad_cp: bool = False,
) -> float:  # fmt: skip
    """Of all devices together. utilisation: share of the peak rate that training reaches on one device, by default
    `usual_utilisation`; scaling: what is left of each device's speed when several exchange gradients."""
    utilisation = usual_utilisation(config) if utilisation is None else utilisation
    alone = utilisation * device.peak / train_flops(config, grad_cp)
    return alone * (devices * scaling if devices > 1 else 1)


def plan_run(
    cfg: TrainConfig, device: Device, tokens: float | None = None, utilisation: float | None = None,
    scaling: float = 0.9, price_per_hour: float = 0.0, logits_whole: bool | None = None,
) -> Plan:  # fmt: skip
    """The plan of the run that `cfg` describes; tokens: how many, by default abs(my_exit_tokens).

    Raises ValueError if neither says how many, or for assumptions outside of (0, 1].
    """
    for name, value in (("utilisation", utilisation), ("scaling", scaling)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}: it is a share, above 0 and at most 1")
    tokens = abs(cfg.my_exit_tokens) if tokens is None else tokens
    if tokens <= 0:
        raise ValueError("tokens: how many are to be trained on? Give tokens, or my_exit_tokens in the configuration")
    config, devices, cp = cfg.model_config(), cfg.devices * cfg.num_nodes, cfg.grad_cp > 0
    needed = memory(
        config, cfg.micro_bsz, cfg.ctx_len, cfg.strategy, devices, cfg.precision, cp, logits_whole,
        accumulate=cfg.accumulate_grad_batches,
    )  # fmt: skip
    speed = tokens_per_second(config, device, devices, utilisation, scaling, cp)
    return Plan(needed, device, devices, speed, tokens, price_per_hour)
