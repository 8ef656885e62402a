"""What all tests share: slow ones on demand, and a guard on torch's global state."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Two workers with a thread pool of the whole machine each are slower than one; set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter, which must be said before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("-m") or ""
    if config.getoption("--slow") or "slow" in chosen or "adversaries" in chosen:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def global_state() -> tuple[object, ...]:
    """What a caller may have set, and must find again."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture(autouse=True)
def _global_state_is_kept() -> Iterator[None]:
    before = global_state()
    yield
    assert global_state() == before, "a test left torch's global state changed"
