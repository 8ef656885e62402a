"""Layers in the layouts of GPTQ, AWQ and compressed-tensors: the very integers that they hold, in as few bits."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseWarning
from tests.patterns.dequantize_linear.formats import FORMATS, GPTQ, K, N


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer, _ in FORMATS.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_the_layers_are_what_they_should_be() -> None:
    for layer, _ in FORMATS.values():
        torch.testing.assert_close(layer.weight(), layer.expected())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, Path]:
    """All of them in one model: a mix of schemes."""
    path = tmp_path_factory.mktemp("formats") / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FxfuseWarning)
        program = fxfuse.onnx.export(
            Together().eval(), (torch.ones(3, K),), path, dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
    return program.model, path


def test_integers(exported: tuple[ir.Model, Path]) -> None:
    """Each of them, and no other node that takes words apart."""
    nodes = [n for n in exported[0].graph if n.op_type == "DequantizeLinear"]
    for node, (name, (layer, kind)) in zip(nodes, FORMATS.items(), strict=True):
        x = node.inputs[0]
        rows = layer.integers[layer.groups.argsort(stable=True)]  # those of a group together
        integers = rows.numpy() if x.shape == (K, N) else rows.t().numpy()
        assert x.dtype.name == kind, name
        assert np.array_equal(x.const_value.numpy().astype(np.int64), integers), name
        assert x.const_value.nbytes == K * N // (1 if kind == "UINT8" else 2)
    assert {n.op_type for n in exported[0].graph} == {"DequantizeLinear", "MatMul", "Gather"}
    (gather,) = (n for n in exported[0].graph if n.op_type == "Gather")  # act-order's, of the activations
    assert gather.inputs[0] is exported[0].graph.inputs[0]


def test_numbers(exported: tuple[ir.Model, Path]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay float32
    session = onnxruntime.InferenceSession(exported[1], options, providers=["CPUExecutionProvider"])
    for rows in (3, 7):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
        for ours, theirs in zip(session.run(None, {"x": x.numpy()}), Together()(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=1e-4)


def test_zero_points_beyond_the_bits() -> None:
    """A zero point of 16, kept as 15, does not fit in four bits: the integers are written in eight."""
    layer = GPTQ()
    layer.qzeros.fill_(-1)
    program = fxfuse.onnx.export(layer.eval(), (torch.ones(3, K),))
    (entry,) = fxfuse.report(program).fused()
    assert entry.parameters["stored"] in ("INT8", "UINT8")
