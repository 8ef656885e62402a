"""What transformers calls a cache, before 5.24 and since."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
import pytest
from torch import nn

from fxfuse.decoder.names import place_of
from fxfuse.errors import FxfuseError
from fxfuse.package.manifest import manifest_of
from fxfuse.versions import CACHE_NAMES, cache_name


class Before(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


class Since(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


class Deprecating(nn.Module):
    """As transformers does it: the old name is still taken, by a wrapper."""

    @functools.wraps(Since.forward)
    def forward(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("model", "name"), [(Before, "past_key_values"), (Since, "cache"), (Deprecating, "cache")], ids=lambda x: str(x)
)
def test_the_model_is_asked(model: type[nn.Module], name: str) -> None:
    assert cache_name(model()) == name


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_graphs_with_names_of_transformers_are_read(name: str) -> None:
    assert place_of(f"input.{name}.layers.3.keys") == (3, "key", f"output.{name}.layers.3.keys")
    assert place_of(f"input.{name}.layers.3.conv_states.0") is None


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_state_that_is_neither_keys_nor_values_is_named(name: str) -> None:
    state = ir.Value(name=f"input.{name}.layers.0.conv_states.0", type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([state], [], nodes=[], opset_imports={"": 24})
    with pytest.raises(FxfuseError, match=rf"input\.{name}\.layers\.0\.conv_states\.0, which is neither keys nor"):
        manifest_of(ir.Model(graph, ir_version=10), "model.onnx")
