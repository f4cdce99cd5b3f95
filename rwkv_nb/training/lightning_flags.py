"""Flags that other command lines know and this one refuses, each with what to use in its place.

The official train.py takes every argument of Lightning 1.9's Trainer, then overwrites some and ignores others; the
official trainer of later years has a few more. To accept one and not act on it would be worse than to say so.
Source: `Trainer.__init__` of pytorch-lightning 1.9.5; RWKV-LM `RWKV-v5/train.py` of December 2023 and later.
"""

from __future__ import annotations

_OVERWRITTEN = "the official script overwrites it, so it never had an effect; leave it out"
_NO_PARTS = "every run reads the data as the stage says; leave it out, and shorten a run with --my_exit_tokens"
_NO_LIMIT = "a run ends by tokens or mini-epochs; use --my_exit_tokens or --my_exit"
_NO_VALIDATION = "there is no such loop here; leave it out"
_GONE = "Lightning 2 has no such flag; use --accelerator and --devices"
_FIXED = "it is set by the trainer and needs no flag; leave it out"

REFUSED = {
    # overwritten in the official script
    "enable_checkpointing": _OVERWRITTEN, "gradient_clip_val": f"{_OVERWRITTEN} (it is always 1.0)",
    "num_sanity_val_steps": _OVERWRITTEN, "check_val_every_n_epoch": _OVERWRITTEN, "log_every_n_steps": _OVERWRITTEN,
    "max_epochs": f"{_OVERWRITTEN}; --my_exit ends a run after that mini-epoch", "replace_sampler_ddp": _OVERWRITTEN,
    "use_distributed_sampler": _OVERWRITTEN,
    # the end of a run, and shorter runs
    "max_steps": _NO_LIMIT, "min_steps": _NO_LIMIT, "min_epochs": _NO_LIMIT, "max_time": _NO_LIMIT,
    "fast_dev_run": _NO_PARTS, "overfit_batches": _NO_PARTS, "limit_train_batches": _NO_PARTS,
    "limit_val_batches": "use --val_split to hold less data out", "limit_test_batches": _NO_VALIDATION,
    "limit_predict_batches": _NO_VALIDATION,
    "val_check_interval": "use --val_every, in steps",
    # devices
    "gpus": _GONE, "tpu_cores": _GONE, "ipus": _GONE, "num_processes": _GONE, "auto_select_gpus": _GONE,
    "amp_backend": "Lightning 2 has no such flag; use --precision",
    "sync_batchnorm": "no batch norm in RWKV; leave it out",
    "amp_level": "Lightning 2 has no such flag; use --precision",
    # what the trainer sets
    "callbacks": _FIXED, "default_root_dir": "use --proj_dir", "gradient_clip_algorithm": _FIXED,
    "enable_model_summary": "a table of parameters is always printed; leave it out", "benchmark": _FIXED,
    "deterministic": "use --random_seed; on a processor the run is then repeatable",
    "reload_dataloaders_every_n_epochs": _FIXED, "plugins": _FIXED, "multiple_trainloader_mode": _FIXED,
    "inference_mode": _FIXED, "move_metrics_to_cpu": _FIXED, "barebones": _FIXED,
    "resume_from_checkpoint": "a run resumes from the newest rwkv-N.pth of --proj_dir (stages 2 to 4); or --load_model",
    # tools of Lightning
    "profiler": "profile with torch.profiler in Python; leave it out", "track_grad_norm": "leave it out",
    "auto_lr_find": "set --lr_init and --lr_final", "auto_scale_batch_size": "set --micro_bsz",
    "detect_anomaly": "use torch.autograd.set_detect_anomaly in Python; leave it out",
    # later official trainers
    "grad_clip": "the norm is always cut at 1.0, as in the article's train.py; leave it out",
    "train_type": "tuning of states alone is not built here; leave it out",
    "betas": "use --beta1 and --beta2", "my_timestamp": "set by the trainer; leave it out",
}  # fmt: skip
