"""The four patterns, registered as their package would do on import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxfuse
from tests.recognise.outside import operators


@pytest.fixture(autouse=True)
def patterns() -> Iterator[dict[str, Any]]:
    @fxfuse.pattern(replacement=operators.packed_swiglu, onnx=operators.PackedSwiGLU)
    def packed_swiglu(x, weight):  # type: ignore[no-untyped-def]
        gate, up = (x @ weight.T).chunk(2, -1)
        return F.silu(gate) * up

    @fxfuse.pattern(replacement=operators.add_layer_norm, onnx=operators.AddLayerNorm)
    def add_layer_norm(x, residual, weight, bias, eps=1e-5):  # type: ignore[no-untyped-def]
        added = x + residual
        return F.layer_norm(added, weight.shape, weight, bias, eps), added

    @fxfuse.pattern(replacement=operators.int8_linear, onnx=operators.Int8Linear)
    def int8_linear(x, weight, scale, zero_point):  # type: ignore[no-untyped-def]
        return x @ ((weight.to(x.dtype) - zero_point.to(x.dtype)) * scale).T

    @fxfuse.pattern(replacement=operators.route, onnx=operators.Route)
    def route(logits, k=2):  # type: ignore[no-untyped-def]
        weights, experts = torch.topk(logits.softmax(-1), k, -1)
        return weights / weights.sum(-1, keepdim=True), experts

    found = {p.name: p for p in (packed_swiglu, add_layer_norm, int8_linear, route)}
    yield found
    for pattern in found.values():
        pattern.unregister()
