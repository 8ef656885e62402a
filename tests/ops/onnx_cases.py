"""The official ONNX node tests of the operators, and how a case is called as a torch operator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.backend.test.case import node as onnx_node_cases

import fxfuse.ops
from fxfuse.ops.opsets import FIRST_OPSET

OPERATORS = {
    "RMSNormalization": torch.ops.fxfuse.rms_norm.default,
    "LayerNormalization": torch.ops.fxfuse.layer_norm.default,
    "RotaryEmbedding": torch.ops.fxfuse.rotary_embedding.default,
    "Attention": torch.ops.fxfuse.attention.default,
    "TensorScatter": torch.ops.fxfuse.tensor_scatter.default,
}
assert set(OPERATORS.values()) <= set(fxfuse.ops.OPS)


class Case(NamedTuple):
    name: str
    opset: int
    operator: Any
    inputs: list[torch.Tensor | None]
    attributes: dict[str, Any]
    outputs: list[int]
    """Which of the operator's outputs the case reads."""
    expected: list[np.ndarray]
    rtol: float
    atol: float

    def call(self, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        outputs = self.operator(*inputs, **self.attributes)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(outputs[i] for i in self.outputs)


def to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load(wanted: Callable[[str, int], bool]) -> list[Case]:
    """The cases of the operators whose name and opset are `wanted`, without the function-body variants."""
    # The public loader builds the cases of all operators, which takes fifteen seconds; these take one.
    for module in ("attention", "layernormalization", "rmsnormalization", "rotaryembedding", "tensorscatter"):
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
    cases = []
    for raw in onnx_node_cases._NodeTestCases:
        nodes, opset = raw.model.graph.node, raw.model.opset_import[0].version
        if len(nodes) != 1 or nodes[0].op_type not in OPERATORS or not wanted(raw.name, opset):
            continue
        node = nodes[0]
        given, expected = raw.data_sets[0]
        values = iter(given)
        inputs = [to_torch(np.array(next(values))) if name else None for name in node.input]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = {n: v.decode() if isinstance(v, bytes) else v for n, v in attributes.items()}
        outputs = [i for i, name in enumerate(node.output) if name]
        operator = OPERATORS[node.op_type]
        if node.op_type == "LayerNormalization":
            outputs, expected = [0], expected[:1]  # the mean and 1/root are none of ours
        elif outputs[-1] == 3:
            operator = torch.ops.fxfuse.attention_with_qk.default
        elif outputs[-1] > 0:
            operator = torch.ops.fxfuse.attention_with_present.default
        assert list(node.output) and raw.name.startswith("test_")
        name = raw.name.removeprefix("test_")
        opset = max(opset, FIRST_OPSET)  # what older opsets have, 23 has too
        cases.append(Case(name, opset, operator, inputs, attributes, outputs, list(expected), raw.rtol, raw.atol))
    return cases
