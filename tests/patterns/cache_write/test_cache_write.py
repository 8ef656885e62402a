"""A cache of a fixed length: new keys written into a buffer are TensorScatter, however that is spelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

import fxfuse.onnx
from tests.decoder.models import build, operators
from tests.decoder.test_torchtune import build as build_torchtune

T = 12


class Step(nn.Module):
    """Two keys after `start` others; `write` says how they get into the buffers, or into the inputs."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("k", torch.zeros(1, 2, T, 8), persistent=False)
        self.register_buffer("v", torch.zeros(1, 2, T, 8), persistent=False)

    def put(self, cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> None:
        slots = torch.arange(new.shape[2]) + start
        if self.write == "index_copy_":
            cache.index_copy_(2, slots, new)
        elif self.write == "index_put_":
            cache[:, :, slots] = new
        elif self.write == "transposed":
            cache.transpose(1, 2)[:, slots] = new.transpose(1, 2)
        elif self.write == "every other slot":
            cache[:, :, 2 * torch.arange(new.shape[2]) + start] = new
        elif self.write == "summed":
            torch.ops.aten.index_put_(cache, [None, None, slots], new, True)
        else:
            cache[:, :, 3:5].copy_(new)

    def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        self.put(self.k, k, start)
        self.put(self.v, v, start)
        mask = torch.arange(T) <= torch.arange(x.shape[1]).unsqueeze(1) + start
        return F.scaled_dot_product_attention(q, self.k, self.v, mask).transpose(1, 2).flatten(2)


def session(onnx_program: Any, folder: Path) -> ort.InferenceSession:
    onnx_program.save(folder / "model.onnx")
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def run(model: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    names = [value.name for value in model.get_outputs()]
    return dict(zip(names, model.run(names, {n: np.asarray(v) for n, v in feeds.items()}), strict=True))


def empty(model: ort.InferenceSession, given: set[str]) -> dict[str, np.ndarray]:
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    return {i.name: np.zeros(i.shape, types[i.type]) for i in model.get_inputs() if i.name not in given}


def fed_back(results: dict[str, np.ndarray], state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: results[n.replace("past_key_values", "present") if "past" in n else f"present.{n}"] for n in state}


@pytest.mark.parametrize("write", ["index_copy_", "index_put_", "slice copy_"])
def test_a_write_is_one_node(write: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Step(write).eval().requires_grad_(False)
    args = (torch.randn(1, 2, 16), torch.tensor([3]))
    shapes = None if write == "slice copy_" else ({1: Dim("new", max=T)}, None)
    onnx_program = fxfuse.onnx.export(torch.export.export(model, args, dynamic_shapes=shapes))
    assert fxfuse.report(onnx_program).counts == {"Attention": 1, "TensorScatter": 2}
    assert operators(onnx_program.model).count("TensorScatter") == 2
    graph = session(onnx_program, tmp_path)
    state = empty(graph, {"x", "start"})
    for start, length in ((3, 2),) if shapes is None else ((0, 5), (5, 1), (6, 2)):
        x, at = torch.randn(1, length, 16), torch.tensor([start])
        results = run(graph, {"x": x, "start": at, **state})
        np.testing.assert_allclose(next(iter(results.values())), model(x, at), atol=1e-5)
        state = fed_back(results, state)
    np.testing.assert_allclose(state["past_key_values.0.key"], model.k, atol=1e-5)


@pytest.mark.parametrize("write", ["every other slot", "summed"])
def test_other_writes_stay_as_they_are(write: str) -> None:
    program = torch.export.export(Step(write).eval(), (torch.randn(1, 2, 16), torch.tensor([3])))
    onnx_program = fxfuse.onnx.export(program)
    assert "TensorScatter" not in fxfuse.report(onnx_program).counts


def test_caches_of_torchtune(tmp_path: Path) -> None:
    """Their positions are a buffer too, and follow one another because they did at first."""
    model = build_torchtune("llama3_2").requires_grad_(False)
    model.setup_caches(batch_size=2, dtype=torch.float32, decoder_max_seq_len=T)  # type: ignore[operator]
    model.eval()  # the caches come in training mode
    causal = torch.ones(T, T, dtype=torch.bool).tril()

    def inputs(start: int, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        at = torch.arange(start, start + length)
        ids = (7 * at + 3).remainder(64).repeat(2, 1)
        return ids, {"mask": causal[at].repeat(2, 1, 1), "input_pos": at.repeat(2, 1)}

    graphs = []
    for length in (4, 1):
        ids, others = inputs(0, length)
        onnx_program = fxfuse.onnx.export(model, (ids,), kwargs=others)
        assert fxfuse.report(onnx_program).counts["TensorScatter"] == 4
        (tmp_path / str(length)).mkdir()
        graphs.append(session(onnx_program, tmp_path / str(length)))
    state = empty(graphs[0], {"tokens", "mask", "input_pos"})
    assert {n for n in state if "past" in n} == {f"past_key_values.{i}.{w}" for i in (0, 1) for w in ("key", "value")}
    for name in state:
        if name.endswith("cache_pos"):
            state[name] = np.arange(T)
    for start, graph, length in ((0, graphs[0], 4), (4, graphs[1], 1), (5, graphs[1], 1)):
        ids, others = inputs(start, length)
        results = run(graph, {"tokens": ids, **others, **state})
        np.testing.assert_allclose(next(iter(results.values())), model(ids, **others), atol=1e-4)
        state = fed_back(results, state)


def test_the_static_cache_of_transformers(tmp_path: Path) -> None:
    model = build("llama").requires_grad_(False)
    model.generation_config.cache_implementation = "static"
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=T, device="cpu").eval()
    feeds = {"input_ids": torch.tensor([[5]]), "cache_position": torch.tensor([0])}
    onnx_program = fxfuse.onnx.export(module, kwargs=feeds)
    assert fxfuse.report(onnx_program).counts["TensorScatter"] == 4
    graph = session(onnx_program, tmp_path)
    state = empty(graph, set(feeds))
    ids = torch.tensor([[5, 9, 21, 3]])
    expected = model(ids, use_cache=False).logits
    for at in range(4):
        results = run(graph, {"input_ids": ids[:, at : at + 1], "cache_position": torch.tensor([at]), **state})
        np.testing.assert_allclose(next(iter(results.values()))[:, 0], expected[:, at], atol=1e-4)
        state = fed_back(results, state)
