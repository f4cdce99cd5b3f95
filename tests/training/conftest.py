"""Fixtures of the tests that train."""

import pytest
import torch
from cli_cases import write_data

from rwkv_nb.training import preflight


@pytest.fixture
def one_thread():
    """Tensors this small gain nothing from more, and lose much where other programs use the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Flags of a run that can start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 0)
    return {
        "data_file": write_data("text"), "data_type": "binidx", "vocab_size": 65536, "ctx_len": 16, "n_layer": 2,
        "n_embd": 64, "micro_bsz": 2, "accelerator": "cpu", "proj_dir": "run", "precision": "fp32",
    }  # fmt: skip
