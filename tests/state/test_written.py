"""Caches as codebases write them: every call right in ONNX Runtime, and what became of the cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import fxfuse.onnx
from tests.state import written
from tests.state.written import B, Cached, E

SLOTS = "nothing says that its slots follow one another"
EXPECTED: dict[str, tuple[dict[str, int], str | None]] = {
    "GptFast": ({"Attention": 1}, SLOTS),
    "LitGPT": ({"Attention": 1}, SLOTS),
    "Llama": ({"Attention": 1, "TensorScatter": 2}, None),
    "Narrow": ({"Attention": 1, "TensorScatter": 2}, None),
    "Megatron": ({"Attention": 1}, "along the first axis"),
    "OneBuffer": ({"Attention": 1}, SLOTS),
    "AllLayers": ({"Attention": 2}, SLOTS),
    "OneHot": ({"Attention": 1}, None),
    "Rolled": ({"Attention": 1}, None),
    "Ring": ({"Attention": 1, "TensorScatter": 2}, None),
    "Rows": ({"Attention": 1}, None),
    "Counted": ({"Attention": 1, "TensorScatter": 2}, None),
    "Int8": ({"Attention": 1}, SLOTS),
    "InPlace": ({"Attention": 1}, SLOTS),
    "XTransformers": ({"Attention": 1, "KVCache": 1}, None),
    "Joined": ({"Attention": 1, "KVCache": 1}, None),
    "JoinedBSHD": ({"Attention": 1}, "of its 4 axes 1 grows"),
    "JoinedSBHD": ({"Attention": 1}, "of its 4 axes 0 grows"),
    "Stacked": ({"Attention": 1, "KVCache": 1}, None),
    "OneHead": ({"Attention": 1}, "of its 3 axes 1 grows"),
    "Bloom": ({"Attention": 1}, "of its 4 axes 3 grows"),
    "Fairseq": ({"Attention": 1}, "of its 3 axes 1 grows"),
    "Cross": ({"Attention": 2, "KVCache": 1}, None),
    "RotatedAfter": ({"Attention": 1, "RotaryEmbedding": 2}, "go through rotary_embedding after they are cached"),
    "Window": ({"Attention": 1, "KVCache": 1}, None),
}
"""Operators, and a near miss that says why there are no more."""
SAMPLE = ("Llama", "Counted", "Int8", "InPlace", "Joined", "OneHead")
NAMES = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]


def sample(model: Cached) -> tuple[torch.Tensor, ...]:
    """Inputs to capture with: no size is 0 or 1."""
    s = model.calls[0]
    past = []
    for tensor, axis in zip(model.past, model.grows, strict=True):
        shape = [5 if i == axis else size for i, size in enumerate(tensor.shape)]
        past.append(torch.randn(shape))
    return torch.randn(B, s, E), *model.positions_at(2, s), *past


@pytest.mark.parametrize("name", NAMES)
def test_call_after_call(name: str, tmp_path: Path) -> None:
    model: Cached = getattr(written, name)()
    held = {n: b.clone().numpy() for n, b in model.named_buffers()}
    path = tmp_path / "model.onnx"
    onnx_program = fxfuse.onnx.export(copy.deepcopy(model), sample(model), path, dynamic_shapes=model.dynamic_shapes())
    counts, reason = EXPECTED[name]
    report = fxfuse.report(onnx_program)
    assert report.counts == counts
    assert reason is None or any(reason in (entry.reason or "") for entry in report)
    follow(path, model, held)


def follow(path: Path, model: Cached, held: dict[str, np.ndarray]) -> None:
    """Every call of `model` in ONNX Runtime as well, each fed with what the one before gave."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    aliases: dict[str, str] = json.loads(metadata.get("fxfuse.state", '{"aliases": {}}'))["aliases"]
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    state: dict[str, Any] = dict(zip(inputs[len(inputs) - len(held) :], held.values(), strict=True))
    given = inputs[: len(inputs) - len(held)]
    mine, theirs, n = [p.clone() for p in model.past], [p.clone() for p in model.past], 0
    for s in model.calls:
        first = torch.randn(B, s, E), *model.positions_at(n, s)
        feeds = dict(zip(given, (t.numpy() for t in (*first, *theirs)), strict=True))
        results = dict(zip(outputs, session.run(outputs, {**feeds, **state}), strict=True))
        returned = model(*first, *mine)
        y, *presents = returned if isinstance(returned, tuple) else (returned,)
        np.testing.assert_allclose(results[outputs[0]], y, atol=1e-5, rtol=1e-4)
        mine = presents or mine  # not returned, they were written to
        names = outputs[1 : 1 + len(presents)] if presents else [f"present.{name}" for name in given[len(first) :]]
        theirs = [torch.from_numpy(results[name]) for name in names]
        for ours, expected in zip(theirs, mine, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-4)
        state = {past: results[present] for present, past in aliases.items() if past in state}
        n += s
