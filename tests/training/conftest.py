"""Fixtures of the tests that train."""

import pytest
from cli_cases import write_data

from rwkv_nb.training import preflight


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Flags of a run that can start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: 0)
    return {
        "data_file": write_data("text"), "data_type": "binidx", "vocab_size": 65536, "ctx_len": 16, "n_layer": 2,
        "n_embd": 64, "micro_bsz": 2, "accelerator": "cpu", "proj_dir": "run", "precision": "fp32",
    }  # fmt: skip
