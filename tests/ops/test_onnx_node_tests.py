"""The official ONNX node tests, on the torch operators and on the nodes that they are exported as."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx.backend.test.runner import Runner

import fxfuse.ops

_spec = importlib.util.spec_from_file_location("onnx_cases", Path(__file__).with_name("onnx_cases.py"))
assert _spec is not None and _spec.loader is not None
onnx_cases = sys.modules.setdefault("onnx_cases", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(onnx_cases)

# Opset 25 adds windows, which 24 does not have.
CASES = onnx_cases.load(lambda name, opset: opset <= 24)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_operator(case: Any) -> None:
    outputs = [onnx_cases.to_numpy(output) for output in case.call(*case.inputs)]
    Runner.assert_similar_outputs(case.expected, outputs, case.rtol, case.atol)
