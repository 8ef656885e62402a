"""Fixtures of the plugin's tests; and no test in this folder leaves torch.onnx wrapped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fxfuse.errors import FxfuseWarning
from tests.onnx.plain_export import Norm, export, functions, operators


@pytest.fixture(scope="session")
def norm() -> nn.Module:
    torch.manual_seed(0)
    return Norm().eval()


@pytest.fixture(scope="session")
def plain(norm: nn.Module) -> list[str]:
    """The operators of an export of `norm` without fxfuse."""
    return operators(export(norm))


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    before = functions()
    yield
    assert functions() == before


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        yield
