"""Writes down every wrong answer that a check rejects while these tests run: test_proofs.py counts them at the end."""

from __future__ import annotations

import pytest

from rwkv_nb.teaching import exercises

_recording = exercises.recorded()


def pytest_configure(config: pytest.Config) -> None:
    config.rejected = _recording.__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    _recording.__exit__(None, None, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name == "test_proofs.py")  # a stable sort: they go last, whatever was asked


@pytest.fixture
def rejected(pytestconfig) -> dict[str, dict[str, str]]:
    """Exercise number -> {message: wrong answer}, of the tests of this folder that ran before."""
    return pytestconfig.rejected
