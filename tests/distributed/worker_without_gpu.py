"""worker.py with fsdp and DeepSpeed on processors: Lightning, torch and the trainer's rules are told that it is fine.

The strategies are the real ones. The processes talk over gloo, parameters, gradients and Adam's state are cut, gathered
and put together again by torch and DeepSpeed. What is not there: a GPU's kernels, streams and memory, and NCCL; the
copies of tensors between a GPU and the CPU, which is all that `fsdp_cpu_offload` adds to `fsdp`. What is replaced:
FSDP's autocast, by that of a processor; waiting for streams and pinned memory, by nothing.
"""

import functools
import importlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytorch_lightning.strategies.deepspeed as of_lightning
import torch
import torch.distributed.fsdp as of_torch
from pytorch_lightning.accelerators.cpu import CPUAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, FSDPPrecision
from pytorch_lightning.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from rwkv_nb.model import elementwise
from rwkv_nb.training import rules, trainer


def deepspeed_on_cpu() -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    of_lightning.CUDAAccelerator = CPUAccelerator
    of_lightning._validate_device_index_selection = lambda devices: None
    initialize = deepspeed.initialize

    def without_an_index(args, **more):
        args.device_rank = -1  # Lightning gives the index of a GPU
        return initialize(args=args, **more)

    deepspeed.initialize = without_an_index
    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True  # slow, but it computes
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]


def fsdp_on_cpu() -> None:
    check, begin = _AcceleratorConnector._check_strategy_and_fallback, of_torch.FullyShardedDataParallel.__init__

    def without_gpu(self):
        try:
            check(self)
        except ValueError as error:
            if "requires a GPU" not in str(error):
                raise

    def on_cpu(self, module, *args, **more):
        begin(self, module, *args, **{**more, "device_id": torch.device("cpu")})

    _AcceleratorConnector._check_strategy_and_fallback = without_gpu
    of_torch.FullyShardedDataParallel.__init__ = on_cpu
    FSDPPrecision.forward_context = lambda self: torch.autocast(
        "cpu", torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16, enabled="mixed" in self.precision
    )
    torch.Tensor.pin_memory = lambda self: self  # for fsdp_cpu_offload, whose pieces are where they are computed with
    torch.cpu.Stream.synchronize = lambda self: None
    # "offloading" to the CPU copies nothing here, and FSDP frees or reuses the memory
    for name in ("FullStateDictConfig", "FullOptimStateDictConfig"):
        setattr(of_torch, name, functools.partial(here, getattr(of_torch, name)))


def watch_patience(seen: dict) -> None:
    """How many seconds the group of all processes waits for one of them, in the end."""
    groups = torch.distributed.distributed_c10d
    change = groups._set_pg_timeout

    def noted(timeout, group=None):
        change(timeout, group)
        of_gloo = groups._get_default_group()._get_backend(torch.device("cpu"))
        seen["waits"] = of_gloo.options._timeout.total_seconds()

    groups._set_pg_timeout = noted


def watch_whole() -> dict[str, int]:
    """How many parameters of FSDP a process holds whole at once: the most so far."""
    kind = importlib.import_module("torch.distributed.fsdp._flat_param").FlatParamHandle
    unshard, reshard = kind.unshard, kind.reshard
    whole, most = {}, {"whole": 0}

    def gather(self):
        unshard(self)
        whole[id(self)] = self.flat_param._unpadded_unsharded_size.numel()
        most["whole"] = max(most["whole"], sum(whole.values()))

    def release(self, free_unsharded_flat_param):
        reshard(self, free_unsharded_flat_param)
        if free_unsharded_flat_param:
            whole.pop(id(self), None)

    kind.unshard, kind.reshard = gather, release
    return most


def watch_moved() -> dict[str, int]:
    """How many parameters DeepSpeed has whole on its device before training: the most at once, and what is left."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    move, cut = DeepSpeedEngine._configure_distributed_model, Init._zero_init_param
    whole, most = {}, {"whole": 0}

    def all_at_once(self, model):
        for parameter in model.parameters():
            whole[id(parameter)] = parameter.numel()  # 0 if it is cut
        most["whole"] = max(most["whole"], sum(whole.values()))
        move(self, model)
        most["kept"] = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())

    def one(self, parameter):
        whole[id(parameter)] = parameter.numel()
        most["whole"] = max(most["whole"], sum(whole.values()))
        cut(self, parameter)
        whole[id(parameter)] = parameter.numel()

    DeepSpeedEngine._configure_distributed_model, Init._zero_init_param = all_at_once, one
    return most


def layer_norm_as_on_a_gpu() -> None:
    """CUDA's autocast takes layer_norm in float32, whatever comes in; a processor's leaves it as it is."""
    plain = torch.nn.functional.layer_norm

    def wide(x, shape, weight=None, bias=None, eps=1e-5):
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (t if t is None else t.float() for t in (x, weight, bias))
        return plain(x, shape, weight, bias, eps)

    torch.nn.functional.layer_norm = wide


def here(kind, offload_to_cpu, rank0_only):
    return kind(offload_to_cpu=False, rank0_only=rank0_only)


def half_precision(kind: str, device: str, scaler: object) -> object:
    """In place of trainer.py's plugin for float16 on a CPU, what Lightning takes on a GPU."""
    if "deepspeed" in STRATEGY:
        return DeepSpeedPrecision(kind)
    plugin = FSDPPrecision(kind)
    plugin.scaler = ShardedGradScaler("cpu")
    return plugin


if __name__ == "__main__":
    SETTINGS = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    STRATEGY, MOST = SETTINGS["flags"]["strategy"], {}
    if STRATEGY.startswith("deepspeed"):
        deepspeed_on_cpu()
        MOST = watch_moved()
        trainer.MixedPrecision = half_precision
    elif STRATEGY.startswith("fsdp"):
        fsdp_on_cpu()
        layer_norm_as_on_a_gpu()
        MOST = watch_whole()
        trainer.MixedPrecision = half_precision
    watch_patience(MOST)
    elementwise.kernel_format = lambda *tensors: None  # the definitions in plain PyTorch, which run on a GPU
    others = rules._others
    rules._others = lambda c: [rule for rule in others(c) if "needs GPUs" not in rule[1]]
    spec = importlib.util.spec_from_file_location("worker", Path(__file__).with_name("worker.py"))
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker.main()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        (Path(SETTINGS["out"]) / "most.json").write_text(json.dumps(MOST), encoding="utf-8")
