"""State that a model writes in place: inputs and outputs of its graph, or an error, but never dropped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.state import lift


class Counter(nn.Module):
    """A step counter, a constant that is no buffer, and nothing that attention reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.last = torch.zeros(2, 4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        y = self.linear(x) + self.steps + self.last
        self.last.copy_(x)
        return y


class Cache(nn.Module):
    """Attention over two caches in buffers; `write` says how the new keys get there."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("k", torch.zeros(1, 2, 6, 8), persistent=False)
        self.register_buffer("v", torch.zeros(1, 2, 6, 8))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        for cache, new in ((self.k, k), (self.v, v)):
            if self.write == "index_copy_":
                cache.index_copy_(2, at, new)
            elif self.write == "index_put_":
                cache[:, :, at] = new
            else:
                cache[:, :, :2].copy_(new)
        mask = torch.arange(6) <= at.unsqueeze(1)
        return F.scaled_dot_product_attention(q, self.k, self.v, mask).transpose(1, 2).flatten(2)


def run(program: Any, **feeds: torch.Tensor | np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {n: np.asarray(v) for n, v in feeds.items()}), strict=True))


@pytest.mark.parametrize("strict", [True, False])
def test_a_counter_and_a_constant(strict: bool) -> None:
    torch.manual_seed(0)
    model, x = Counter().eval(), torch.randn(2, 4)
    program = torch.export.export(model, (x,), strict=strict)
    before = str(program.graph)
    onnx_program = fxfuse.onnx.export(program)
    assert str(program.graph) == before
    state = {"steps": np.zeros(1, np.float32), "last": np.zeros((2, 4), np.float32)}
    assert [v.name for v in onnx_program.model.graph.inputs] == ["x", *state]
    assert [v.name for v in onnx_program.model.graph.outputs][1:] == ["present.steps", "present.last"]
    for _ in range(3):
        x = torch.randn(2, 4)
        results = run(onnx_program, x=x, **state)
        y = next(iter(results.values()))
        np.testing.assert_allclose(y, model(x).detach(), rtol=1e-5, atol=1e-6)
        state = {name: results[f"present.{name}"] for name in state}
    assert state["steps"] == 3
    metadata = json.loads(onnx_program.model.metadata_props["fxfuse.state"])
    assert metadata["aliases"] == {"present.steps": "steps", "present.last": "last"}


def test_a_lifted_program_runs_and_is_called_with_its_state() -> None:
    x = torch.randn(2, 4)
    lifted = lift(torch.export.export(Counter().eval(), (x,)))
    assert [s.target for s in lifted.states] == ["steps", "last"]
    model = lifted.program.module()
    state: dict[str, Any] = {s.placeholder: s.initial for s in lifted.states}
    for step in (1, 2):
        _, state = model(x, **state)
        assert state["b_steps"] == step
    assert torch.equal(state["b_last"], x)
    assert lift(lifted.program).program is lifted.program, "there is nothing left to lift"


@pytest.mark.parametrize("write", ["index_copy_", "index_put_", "slice copy_"])
def test_caches_in_buffers_are_named_by_their_layer(write: str) -> None:
    torch.manual_seed(0)
    model = Cache(write).eval()
    program = torch.export.export(model, (torch.randn(1, 2, 16), torch.tensor([0, 1])))
    onnx_program = fxfuse.onnx.export(program)
    cache = {f"past_key_values.0.{what}": np.zeros((1, 2, 6, 8), np.float32) for what in ("key", "value")}
    assert {v.name for v in onnx_program.model.graph.inputs} == {"x", "at", *cache}
    for at in ([0, 1],) if write == "slice copy_" else ([0, 1], [2, 3]):
        x = torch.randn(1, 2, 16)
        results = run(onnx_program, x=x, at=torch.tensor(at), **cache)
        np.testing.assert_allclose(next(iter(results.values())), model(x, torch.tensor(at)).detach(), atol=1e-5)
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    np.testing.assert_allclose(cache["past_key_values.0.key"], model.k.detach(), atol=1e-5)
    np.testing.assert_allclose(cache["past_key_values.0.value"], model.v.detach(), atol=1e-5)


class GivenCache(nn.Module):
    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[:, 1:3] = x
        return cache.sum(1)


@pytest.mark.parametrize("names", [None, ["new", "past"]])
def test_an_input_that_is_written_to_comes_out_too(names: list[str] | None) -> None:
    x, cache = torch.randn(2, 2, 4), torch.randn(2, 5, 4)
    onnx_program = fxfuse.onnx.export(GivenCache().eval(), (x, cache.clone()), input_names=names)
    first, second = names or ["x", "cache"]
    assert [v.name for v in onnx_program.model.graph.inputs] == [first, second]
    results = run(onnx_program, **{first: x, second: cache})
    expected = cache.clone()
    total = GivenCache()(x, expected)
    np.testing.assert_allclose(results[f"present.{second}"], expected)
    np.testing.assert_allclose(next(iter(results.values())), total, rtol=1e-5)


@torch.library.custom_op("fxfuse_tests::bump", mutates_args=("x",))
def bump(x: torch.Tensor) -> None:
    x.add_(1)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.ops.fxfuse_tests.bump(self.steps)
        return x + self.steps


def test_what_cannot_be_lifted_is_named_with_its_line() -> None:
    with pytest.raises(FxfuseError) as caught:
        fxfuse.onnx.export(Opaque().eval(), (torch.randn(2),))
    assert "'steps'" in caught.value.what and "test_lift.py" in str(caught.value.where)


@pytest.mark.parametrize("module", [Counter(), Opaque()])
def test_the_plugin_drops_nothing(module: nn.Module) -> None:
    x = torch.randn(2, 4) if isinstance(module, Counter) else torch.randn(2)
    with fxfuse.onnx.enabled(), pytest.raises(Exception, match="steps") as caught:
        torch.onnx.export(module.eval(), (x,), dynamo=True, opset_version=24, verbose=False)
    chain = [caught.value, caught.value.__cause__]
    assert any(isinstance(error, FxfuseError) for error in chain)


class Reveals(nn.Module):
    """Causal in the first call only: the mask is a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.scaled_dot_product_attention(x, x, x, self.mask)
        self.mask.fill_(True)
        return y


def test_what_is_written_to_is_no_constant() -> None:
    x = torch.randn(1, 2, 5, 8)
    fused = fxfuse.fuse(torch.export.export(Reveals(), (x,)))
    assert fxfuse.report(fused).counts == {"Attention": 1}
    module, model = fused.module(), Reveals()
    for _ in range(2):
        torch.testing.assert_close(module(x), model(x))
