"""Several processes, one run: who speaks and writes for all, and whether all begin with the same.

A run over several devices is the same program in each process. What they read may differ without anybody noticing: a
`proj_dir` that is not shared, a disk that failed one of them, another command on the second node. Then Adam's averages
in one process would be those of another run. So all tell each other what they are about to begin with. Weights alone
need no question: process 0 hands out its own (strategies.py).

It is: the questions who is first, and who begins with what. It is not: anything that is told during the run. Imports no
torch before it is needed.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_nb.training.config import TrainConfig
    from rwkv_nb.training.resume import Start

OWN = ("proj_dir", "data_file", "qa_pile_file", "load_model", "enable_progress_bar", "logger", "wandb")


def first_process(cfg: TrainConfig) -> bool:
    """Whether this process speaks and writes for the run: launchers and job managers number the others.

    A run on one device is a run of its own, whatever numbers it was given: of twenty that a job array has started,
    each is the first.
    """
    if cfg.devices * cfg.num_nodes == 1:
        return True
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    if "LOCAL_RANK" in os.environ:  # Lightning's children; before Slurm's number, which they have from their parent
        return os.environ["LOCAL_RANK"] == "0" == os.environ.get("NODE_RANK", "0")
    return all(os.environ.get(name, "0") == "0" for name in ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK"))


def beginning(cfg: TrainConfig, start: Start | None, n_tokens: int) -> dict[str, Any]:
    """What has to be the same in all processes: flags that are no paths, the data's length, the file to go on from."""
    found = {f"--{name}": value for name, value in cfg.flags().items() if name not in OWN}
    found["tokens in the data"] = n_tokens
    if start is None:
        return found
    found |= {"file to begin with": start.path.name, "mini-epoch and batch": start.position}
    if start.state is not None:
        norm = start.weights["ln_out.weight"].contiguous().numpy()
        found |= {"optimizer step": start.state.step, "weights of the state (checksum)": zlib.crc32(norm.tobytes())}
    return found


def several_processes() -> bool:
    """Whether this process can talk to others of its run."""
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_same(mine: dict[str, Any]) -> None:
    """Raise ValueError, in every process, unless all processes bring the same; every one must call it."""
    if not several_processes():
        return
    import torch

    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    first, *others = everyone
    for rank, other in enumerate(others, start=1):
        differ = [f"{name}: {first.get(name)!r}, in process {rank} {other.get(name)!r}"
                  for name in first.keys() | other.keys() if first.get(name) != other.get(name)]  # fmt: skip
        if differ:
            raise ValueError(
                f"the processes do not begin with the same, in process 0 {'; '.join(sorted(differ))}. All need the "
                "same flags, and the same proj_dir and data on a disk that they share"
            )
