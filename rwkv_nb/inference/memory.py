"""How many bytes a strategy puts where, whether they fit, and how fast a token can be at best.

    plan = parse_strategy("cuda fp16i8 *20 -> cpu fp32", config.n_layer)
    needed = memory_plan(plan, config)
    needed.weights["cuda"], needed.state["cuda"], needed.streamed, needed.layers
    needed.lacking(machine), needed.tokens_per_second(machine)

Each token reads every weight once (but one row of the embedding), so a device cannot be faster than its memory:
seconds a token = bytes read / bandwidth, summed over the devices, plus what is streamed over the bus.

8-bit matrices cost the package more time than their bytes say, because it unpacks them at each step (UNPACKING). Our
own decoder on a processor multiplies them as they are (OURS); its scales make them a sixteenth larger.

What it is not: a measurement. Working memory beside weights and state (activations, the allocator's reserve, CUDA's own
few hundred MB) is not counted; leave a tenth free. Bytes agree with what the `rwkv` package allocates.
Source: the loading loop of `rwkv/model.py`, 0.8.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import is_mask, parameter_shapes

from .strategy import Place, Plan, parse_strategy

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STREAMED = ("key.weight", "value.weight", "receptance.weight", "output.weight")  # of a block; the gate stays
# How many times longer than its bytes an 8-bit matrix takes in the `rwkv` package. On a processor: 2.2 tokens/s were
# measured where float32, four times the bytes, reached 21.8. On cards: 17 tokens/s for 14 GB at 600 GB/s (an A10, as
# reported for ChatRWKV without its own CUDA kernels).
UNPACKING = {"cpu": 40.0, "card": 2.5}
OURS = {"cpu": 1.0, "card": 2.5}
SPARE = 0.1  # share of a device that a plan should leave free


@dataclass(frozen=True)
class Device:
    """A place for layers. memory, free: bytes. bandwidth: bytes a second that products can read. bus: bytes a second to
    it from the computer's memory."""

    memory: float
    bandwidth: float
    bus: float = 12e9  # a PCIe 3.0 slot of 16 lanes, as copies see it


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a strategy, by device name. "cuda" and "cuda:0" are one device; the name that comes first counts.

    streamed: what travels to the device at every step (it lies in "cpu").
    layers: weights of each place, wherever they lie; the embedding, which is always on "cpu", is in none.
    """

    plan: Plan
    weights: dict[str, int]
    state: dict[str, int]
    read: dict[str, float]  # bytes that one token reads, those in 8 bits times their slowness
    streamed: dict[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    embedding: int = 0

    def total(self, device: str) -> int:
        """Weights and state of one sequence on a device."""
        return self.weights.get(device, 0) + self.state.get(device, 0)

    def lacking(self, machine: dict[str, Device], spare: float = SPARE) -> dict[str, float]:
        """Device -> bytes that are missing there; empty if the plan fits. One that is not there lacks everything."""
        found = {name: find_device(machine, name) for name in self.weights}
        room = {name: device.memory * (1 - spare) if device else 0.0 for name, device in found.items()}
        return {name: self.total(name) - room[name] for name in self.weights if self.total(name) > room[name]}

    def seconds_per_token(self, machine: dict[str, Device]) -> float:
        """The least time that reading memory takes for one token. Raises KeyError for a device that is not there."""
        for name in self.read:
            if find_device(machine, name) is None:
                raise KeyError(f"{name}: not among the devices {', '.join(machine)}")
        reading = sum(n / find_device(machine, name).bandwidth for name, n in self.read.items())
        return reading + sum(n / find_device(machine, name).bus for name, n in self.streamed.items())

    def tokens_per_second(self, machine: dict[str, Device]) -> float:
        """At most so many, one after the other."""
        return 1 / self.seconds_per_token(machine)


def find_device(machine: dict[str, Device], name: str) -> Device | None:
    """A device by its name; "cuda" and "cuda:0" are the same. None if it is not there."""
    other = {"cuda": "cuda:0", "cuda:0": "cuda"}.get(name, name)
    return machine.get(name, machine.get(other))


def memory_plan(plan: Plan, config: ModelConfig, slowness: Mapping[str, float] = UNPACKING) -> MemoryPlan:
    """Bytes by device. slowness: UNPACKING for the package, OURS where our decoder runs.

    Raises ValueError if the plan is one for another number of layers.
    """
    if plan.n_layer != config.n_layer:
        raise ValueError(f"the strategy was planned for {plan.n_layer} layers, the model has {config.n_layer}")
    weights, read, streamed, layers = Counter(), Counter(), Counter(), [0] * len(plan.places)
    embedding, same = 0, _names(plan)
    for name, shape in parameter_shapes(config).items():
        if ".ln0." in name or is_mask(name):
            continue  # ln0 is worked into the embedding while loading
        place, size = place_of(name, plan), stored_bytes(name, shape, place_of(name, plan))
        if name == "emb.weight":  # stays in the computer's memory; a token looks up one row of it
            embedding = size
            weights["cpu"] += size
            read["cpu"] += size // shape[0]
            continue
        device = same[place.device]
        layers[place.index] += size
        read[device] += size * _slowness(shape, place, slowness)
        if place.streamed and place.device != "cpu" and name.startswith("blocks.") and name.endswith(STREAMED):
            travels = matrix_bytes(shape, place)  # its scales stay on the device
            streamed[device] += travels
            weights["cpu"] += travels
            size -= travels
        weights[device] += size
    state = _state_bytes(plan, config)
    return MemoryPlan(plan, dict(weights), state, dict(read), dict(streamed), tuple(layers), embedding)


def _names(plan: Plan) -> dict[str, str]:
    """Device -> the name that counts: the first one of "cuda" and "cuda:0" in a plan that uses both."""
    devices = plan.devices
    pair = [name for name in devices if name in ("cuda", "cuda:0")]
    return {name: pair[0] if name in pair else name for name in devices}


def place_of(name: str, plan: Plan) -> Place:
    """The place of a parameter: that of its block; of the first block for the embedding, the last one for the head."""
    if name.startswith(("head.", "ln_out.")):
        return plan.places[-1]
    return plan.places[int(name.split(".")[1]) if name.startswith("blocks.") else 0]


def stored_bytes(name: str, shape: tuple[int, ...], place: Place) -> int:
    """Bytes of one parameter: decay, bonus and group norm always in float32, matrices in 8 bits where asked for."""
    numbers = 1
    for n in shape:
        numbers *= n
    if any(part in name for part in (".time_decay", ".time_faaaa", ".ln_x.")):
        return 4 * numbers
    if len(shape) == 2 and name != "emb.weight":
        scales = 2 * sum(shape) * BYTES[place.dtype] if place.eight_bit else 0  # a least value and a range: row, column
        return matrix_bytes(shape, place) + scales
    return numbers * BYTES[place.dtype]


def matrix_bytes(shape: tuple[int, ...], place: Place) -> int:
    """Bytes of a matrix without its scales."""
    return shape[0] * shape[1] * (1 if place.eight_bit else BYTES[place.dtype])


def _slowness(shape: tuple[int, ...], place: Place, slowness: Mapping[str, float]) -> float:
    """How many times longer than its bytes a parameter takes."""
    packed = place.eight_bit and len(shape) == 2
    return slowness["cpu" if place.device == "cpu" else "card"] if packed else 1.0


def _state_bytes(plan: Plan, config: ModelConfig) -> dict[str, int]:
    """The state of one sequence: two rows of n_embd in the block's format, heads of N x N in float32."""
    state: dict[str, int] = {}
    same = _names(plan)
    for place in plan.places[:-1]:
        size = 2 * config.n_embd * BYTES[place.dtype] + 4 * config.dim_att * config.head_size_a
        device = same[place.device]
        state[device] = state.get(device, 0) + size
    return state


def best_strategy(
    config: ModelConfig, machine: dict[str, Device], slowness: Mapping[str, float] = UNPACKING,
    can: Callable[[Plan], bool] | None = None,
) -> MemoryPlan | None:  # fmt: skip
    """The quickest strategy that fits, by the bandwidth limit, of those that `can` (None: any); None if nothing fits.

    Tried: each device alone in each format; as many layers on a card as it holds, the others on the next cards and the
    processor, or streamed. Of equally quick ones bf16 comes first: it is what files hold. slowness: see memory_plan.
    """
    cards = [name for name in machine if name != "cpu"]
    texts = [f"cpu {format}" for format in ("fp32", "bf16", "fp16", "fp32i8")]
    for format in ("fp32", "bf16", "fp16", "fp16i8"):
        for card in cards:
            texts.append(f"{card} {format}")
            texts += [_filled([card], format, rest, config, machine) for rest in (" -> cpu fp32", " -> cpu bf16", "+")]
        if len(cards) > 1:
            texts += [_filled(cards, format, rest, config, machine) for rest in ("", " -> cpu fp32", " -> cpu bf16")]
    plans = (parse_strategy(text, config.n_layer) for text in texts if text)
    needed = (memory_plan(plan, config, slowness) for plan in plans if can is None or can(plan))
    fitting = [p for p in needed if not p.lacking(machine)]
    return min(fitting, key=lambda p: p.seconds_per_token(machine), default=None)


def _filled(cards: list[str], format: str, rest: str, config: ModelConfig, machine: dict[str, Device]) -> str | None:
    """Cards filled with layers one after the other, what is left as `rest` says ("+" with one card alone).

    None if a card holds not even one layer, or if something is left without a rest.
    """
    written, left = "", config.n_layer + (rest == "")  # without a rest the cards take the head too
    for i, card in enumerate(cards):
        last, start = i == len(cards) - 1, f"{written}{card} {format} *"
        n = _most(start + "{}" + (rest or " -> cpu bf16"), config, machine, left, 0 if rest == "+" else 1)
        if n is None:
            return None
        written, left = f"{start}{n}{'' if last else ' -> '}", left - n
        if left == 0 and not last:
            written = written.removesuffix(" -> ")
            break
    return written + rest if rest or left == 0 else None


def _most(text: str, config: ModelConfig, machine: dict[str, Device], left: int, least: int) -> int | None:
    """The largest number of layers, up to `left`, for which no card lacks anything; None if `least` is too many.

    More layers on a card need less elsewhere: try half of what is open, as in looking up a word.
    """

    def lacks_on_card(n: int) -> bool:
        plan = memory_plan(parse_strategy(text.format(n), config.n_layer), config)
        return any(name != "cpu" for name in plan.lacking(machine))

    n = bisect.bisect_left(range(least, left + 1), True, key=lacks_on_card) + least - 1
    return n if n >= least else None
