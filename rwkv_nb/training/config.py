"""Every flag of the official train.py, with its default, its meaning and what follows from it.

It is: a frozen record of one run, the source of the command line's help, and the place where impossible combinations
are named before anything is loaded. It is not: a file format, and it imports no torch, so that checks cost nothing.

Symbols: real_bsz = num_nodes * devices * micro_bsz samples a step; a mini-epoch in stages 1 to 4 is 40320 = 8! samples;
p = magic_prime, the number of chunks of ctx_len tokens that the sampler walks through.
Source: the argument list of RWKV-LM `RWKV-v5/train.py` of December 2023 (the article's listing), and its bookkeeping.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_nb.model.config import ModelConfig

MINI_EPOCH = 40320  # samples in a mini-epoch of stages 1 to 4: 8!, divisible by nearly every small batch size
NEVER = 99999999  # the official "no limit"

DATA_TYPES = ("utf-8", "utf-16le", "numpy", "binidx", "dummy", "uint16")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
RECIPES = ("head", "seed")
RESUMES = ("state", "weights")
LOGGERS = ("none", "csv", "tensorboard")


class ConfigError(ValueError):
    """A run that cannot start. `problems`: one line for each mistake, with flag, value and remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("this run cannot start:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _flag(default: Any, group: str, help: str) -> Any:
    return field(default=default, metadata={"group": group, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """The flags of one run. `dim_att`, `dim_ffn`, and in stages 1 to 4 `epoch_steps`, `epoch_count` and `my_pile_shift`
    are replaced at construction by what they stand for, as the official script does; change a configuration with
    `replace`, which starts again from the values given.

    Raises ValueError at construction if 40320 is no multiple of the batch size (stages 1 to 4); everything else is
    found by `validate()`.
    """

    load_model: str = _flag("", "run", "checkpoint to start from, or grow (stage 1); empty: new weights or the newest")
    wandb: str = _flag("", "run", "Weights & Biases project; empty: do not use it")
    proj_dir: str = _flag("out", "run", "folder for checkpoints and train_log.txt")
    random_seed: int = _flag(-1, "run", "seed of all random numbers; negative: leave them alone")
    recipe: str = _flag("head", "run", "head: today's official weights, warm-up, decay groups; seed: those of 2023")
    logger: str = _flag("none", "run", "where each step's loss, lr and speed go, in proj_dir: csv, tensorboard or none")
    enable_progress_bar: bool = _flag(True, "run", "a line with steps, loss, lr, Kt/s and the time left")
    resume: str = _flag("state", "run", "stages 2 to 4: state goes on where the run stood, weights as officially")
    save_state: bool = _flag(True, "run", "write trainer states (rwkv-N.state): optimizer, position, random numbers")
    save_minutes: float = _flag(10.0, "run", "minutes between two trainer states within a mini-epoch; 0: do not mind")
    save_steps: int = _flag(0, "run", "steps between two trainer states within a mini-epoch; 0: do not mind")

    data_file: str = _flag("", "data", "the data: a path, or a prefix of .bin and .idx for binidx")
    data_type: str = _flag("utf-8", "data", "utf-8, utf-16le, numpy, binidx, dummy or uint16")
    vocab_size: int = _flag(0, "data", "tokens in the vocabulary; 0: ask the data (character level); 65536 for World")
    ctx_len: int = _flag(1024, "data", "tokens in a training window")
    magic_prime: int = _flag(0, "data", "largest prime 3n+2 not above data_tokens // ctx_len - 1; 0: computed")
    my_pile_version: int = _flag(1, "data", "2: data_file lists several binidx files, one a line")
    my_pile_stage: int = _flag(0, "data", "0 plain; 1 only build weights; 2 warm up; 3 train; 4 random windows")
    my_pile_shift: int = _flag(-1, "data", "shift every window by so many tokens; negative: 0")
    my_qa_mask: int = _flag(0, "data", "mix with question-and-answer data: 1 masks the loss, 2 does not")
    qa_pile_file: str = _flag("", "data", "prefix of the general binidx data that my_qa_mask mixes in")
    qa_mask_ids: str = _flag("187,187,34,27", "data", "tokens after which an answer begins, of the 20B tokenizer")
    val_split: float = _flag(0.0, "data", "fraction at the end of the data held out for a validation loss; 0: none")
    val_every: int = _flag(0, "data", "steps between validations; 0: at the end of each mini-epoch alone")
    my_random_steps: int = _flag(0, "data", "so many samples from random places before the prime walk begins")
    my_sample_len: int = _flag(0, "data", "row length of uint16 data")

    epoch_steps: int = _flag(1000, "epochs", "batches a device in a mini-epoch (stage 0; else 40320 // batch size)")
    epoch_count: int = _flag(500, "epochs", "mini-epochs over which lr decays (stage 0; else magic_prime // 40320)")
    epoch_begin: int = _flag(0, "epochs", "number of the first mini-epoch; set by resuming")
    epoch_save: int = _flag(5, "epochs", "save rwkv-N.pth every so many mini-epochs; 0: only the last")
    my_exit: int = _flag(NEVER, "epochs", "stop after the mini-epoch of this number")
    my_exit_tokens: int = _flag(0, "epochs", "stop after so many tokens, lr by cosine; negative: mean of both lr")

    micro_bsz: int = _flag(12, "batch", "samples a device in a batch")
    accumulate_grad_batches: int = _flag(1, "batch", "batches whose gradients make one step")

    n_layer: int = _flag(6, "model", "number of blocks")
    n_embd: int = _flag(512, "model", "width, a multiple of 32")
    dim_att: int = _flag(0, "model", "width of time mixing; 0: n_embd")
    dim_ffn: int = _flag(0, "model", "width of channel mixing; 0: 3.5 * n_embd, rounded down to a multiple of 32")
    head_size_a: int = _flag(64, "model", "channels in a head")
    head_size_divisor: int = _flag(8, "model", "WKV's output is divided by it before the group norm")
    pre_ffn: int = _flag(0, "model", "1: block 0 has a second channel mixing in place of time mixing")
    head_qk: int = _flag(0, "model", "width of the head that copies earlier tokens; 0: none")
    tiny_att_dim: int = _flag(0, "model", "width of the tiny attention; 0: none")
    tiny_att_layer: int = _flag(-999, "model", "the block that has the tiny attention")
    my_pos_emb: int = _flag(0, "model", "size of the two-dimensional position embedding; 0: none")
    my_ffn_shift: int = _flag(1, "model", "accepted, does nothing (nor does it in the official code)")
    my_att_shift: int = _flag(1, "model", "accepted, does nothing (nor does it in the official code)")
    my_testing: str = _flag("", "model", "empty or x052: RWKV-5.2; g or x052g: with MishGLU in place of channel mixing")
    load_partial: int = _flag(0, "model", "1: weights that the checkpoint lacks keep their initial values")

    lr_init: float = _flag(6e-4, "optimizer", "first learning rate: 6e-4 for L12-D768, 4e-4 L24-D1024, 3e-4 L24-D2048")
    lr_final: float = _flag(1e-5, "optimizer", "last learning rate")
    warmup_steps: int = _flag(-1, "optimizer", "warm-up after each start; -1: none, on resume 10 (stage 2) or 30 (3)")
    beta1: float = _flag(0.9, "optimizer", "Adam: memory of the gradient")
    beta2: float = _flag(0.99, "optimizer", "Adam: memory of its square; 0.999 close to convergence")
    adam_eps: float = _flag(1e-8, "optimizer", "Adam: added to the root of the square")
    dropout: float = _flag(0.0, "optimizer", "probability of dropout; try 0.01 to 0.1 on small data")
    weight_decay: float = _flag(0.0, "optimizer", "AdamW's decay of the matrices; try 0.001 to 0.1")
    weight_decay_final: float = _flag(-1.0, "optimizer", "decay at the end, reached exponentially; 0 or less: constant")
    layerwise_lr: int = _flag(1, "optimizer", "1: time_decay learns 2 times as fast (5 times in stage 2)")
    my_pile_edecay: int = _flag(0, "optimizer", "so many mini-epochs before lr begins to decay")

    accelerator: str = _flag("gpu", "machine", "gpu (or cuda), mps, cpu or auto")
    devices: int = _flag(1, "machine", "devices in each node")
    num_nodes: int = _flag(1, "machine", "machines")
    strategy: str = _flag("auto", "machine", "Lightning's strategy: auto, ddp, deepspeed_stage_2, …")
    precision: str = _flag("fp16", "machine", "fp32, tf32, fp16 or bf16; weights themselves stay float32")
    grad_cp: int = _flag(0, "machine", "1: recompute activations in the backward pass: less memory, slower")
    compile: int = _flag(0, "machine", "1: torch.compile the blocks: a minute at the start, then sometimes quicker")
    ds_bucket_mb: int = _flag(200, "machine", "DeepSpeed's bucket size in MB")

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        object.__setattr__(self, "_given", given)
        if _wrong_types(given):
            self.validate()  # raises: nothing can be derived from a value of the wrong type
        derived: dict[str, int] = {}
        if self.dim_att <= 0:
            derived["dim_att"] = self.n_embd
        if self.dim_ffn <= 0:
            derived["dim_ffn"] = int(self.n_embd * 3.5) // 32 * 32
        if self.my_pile_stage > 0:
            primes = 2 * self.magic_prime if self.my_qa_mask == 2 else self.magic_prime
            derived["epoch_count"] = max(1, primes // MINI_EPOCH)  # the official 0 for small data never decays lr
            derived["epoch_steps"] = MINI_EPOCH // max(1, self.real_bsz)
            derived["my_pile_shift"] = max(0, self.my_pile_shift)
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if self.my_pile_stage > 0 and (self.real_bsz < 1 or MINI_EPOCH % self.real_bsz):
            self.validate()  # raises, with everything else that is wrong

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some flags changed; what follows from flags is worked out again."""
        unknown = sorted(set(changes) - set(self._given))
        if unknown:
            raise ValueError(f"no such flag: {', '.join(unknown)}; TrainConfig's fields are the flags")
        return TrainConfig(**{**self._given, **changes})

    @property
    def real_bsz(self) -> int:
        """Samples in a batch over all devices."""
        return self.num_nodes * self.devices * self.micro_bsz

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step over all devices, accumulated batches included."""
        return self.real_bsz * self.ctx_len * self.accumulate_grad_batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a mini-epoch."""
        return self.epoch_steps // self.accumulate_grad_batches

    @property
    def samples_per_epoch(self) -> int:
        return self.epoch_steps * self.real_bsz

    @property
    def betas(self) -> tuple[float, float]:
        return (self.beta1, self.beta2)

    @property
    def run_name(self) -> str:
        return f"{self.vocab_size} ctx{self.ctx_len} L{self.n_layer} D{self.n_embd}"

    def model_config(self) -> ModelConfig:
        """The model that these flags describe (vocab_size must be known by now)."""
        from rwkv_nb.model.config import ModelConfig

        shared = {f.name for f in dataclasses.fields(ModelConfig)} & set(self._given)
        return ModelConfig(**{name: getattr(self, name) for name in shared})

    def flags(self) -> dict[str, Any]:
        """Flag -> value in force, in the order of the fields (what train_log.txt records)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def notes(self) -> list[str]:
        """What a user should know about a valid run: not errors."""
        notes = []
        if 0 < self.magic_prime < MINI_EPOCH and 0 < self.my_pile_stage < 4:
            notes.append(
                f"the data has {self.magic_prime} chunks of {self.ctx_len} tokens, fewer than the {MINI_EPOCH} samples "
                f"of a mini-epoch: each is seen about {MINI_EPOCH / self.magic_prime:.1f} times in it; epoch_count is 1"
            )
        if self.my_exit_tokens == 0 and self.my_exit >= NEVER and self.my_pile_stage != 1:
            notes.append("neither my_exit_tokens nor my_exit is given: training goes on until it is interrupted")
        if self.n_layer == 1:
            notes.append("n_layer=1 trains, but the `rwkv` package cannot load such a checkpoint: use 2 or more")
        if self.save_state and self.strategy.startswith(("deepspeed", "fsdp")):
            notes.append(f"save_state: with strategy={self.strategy!r} each .state is put together in the RAM of the "
                         "first process, 12 bytes a parameter, three of them lie on the disk while one is written, and "
                         "a run that goes on reads one in each process; save_minutes=0 writes fewer, save_state=False "
                         "none")
        if self.dim_att != self.n_embd:
            notes.append(f"dim_att={self.dim_att} trains, but the official trainer and the `rwkv` package stop at a "
                         f"model where it is not n_embd={self.n_embd}")
        options = [n for n in ("pre_ffn", "head_qk", "tiny_att_dim", "my_pos_emb") if getattr(self, n) > 0]
        options += ["my_testing"] * ("g" in self.my_testing)
        if options:
            notes.append(f"{', '.join(options)}: only this package and the official trainer know such a model; others, "
                         "the `rwkv` package among them, stop at its file or run it wrongly without a word")
        return notes

    def problems(self) -> list[str]:
        """Every mistake, each as one line that names flag, value and remedy. Empty: the run is possible."""
        from rwkv_nb.training.rules import broken_rules

        return _wrong_types(self._given) or broken_rules(self)

    def validate(self) -> None:
        """Raises ConfigError, a ValueError, that lists every mistake at once."""
        problems = self.problems()
        if problems:
            raise ConfigError(problems)


def _wrong_types(given: dict[str, Any]) -> list[str]:
    wrong = []
    for f in dataclasses.fields(TrainConfig):
        kinds = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}[f.type]
        if not isinstance(given[f.name], kinds) or (f.type != "bool" and isinstance(given[f.name], bool)):
            wrong.append(f"{f.name}={given[f.name]!r}: expected {f.type}, got {type(given[f.name]).__name__}")
    return wrong


def working_batch_sizes(real_bsz: int) -> tuple[int, int]:
    """The nearest divisors of 40320 at or below and at or above `real_bsz` (equal if it is one itself)."""
    divisors = [d for d in range(1, MINI_EPOCH + 1) if MINI_EPOCH % d == 0]
    below = max((d for d in divisors if d <= real_bsz), default=1)
    return below, min((d for d in divisors if d >= real_bsz), default=MINI_EPOCH)
