"""Fixtures of the tests of data."""

import os

import numpy as np
import pytest
from dataset_cases import write_pair


@pytest.fixture
def no_fsync(monkeypatch):
    """Waiting for the disk makes thousands of tiny pairs slow. One test below replaces it by a recorder."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> str:
    """A pair whose token at position i is i, so that a window tells where it starts. 1000 tokens: p = 113 of 125."""
    return write_pair(tmp_path_factory.mktemp("pair") / "counting", np.arange(1000, dtype=np.uint16))
