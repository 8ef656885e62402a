"""The official ONNX node tests, on the torch operators and on the nodes that they are exported as."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.runner import Runner
from onnx.reference import ReferenceEvaluator

import fxfuse.ops
from tests.ops import onnx_cases

ERRATA = "before mask addition" in onnx.defs.get_schema("Attention", 24).attributes["qk_matmul_output_mode"].description
"""onnx 1.22 corrected what the scores are that Attention gives back: soft-capped before the mask, not after."""
CASES = onnx_cases.load(lambda name, opset: opset <= 24 and (ERRATA or "qk_matmul_" not in name))
WINDOWS = onnx_cases.load(lambda name, opset: opset == 25 and "window" in name)
"""Opset 25 has windows, which 24 does not have."""

BF16, MASKED, SHORT, ULP = (
    "NOT_IMPLEMENTED",
    "inf location mismatch",
    "inconsistent total_sequence",
    "elements: 1 / 192",
)
ORT_FAILS = {
    # ONNX Runtime's CPU provider has no bfloat16 Attention, and no bfloat16 Add or Expand to spell it with.
    "attention_4d_causal_bf16": BF16,
    "attention_3d_causal_bf16": BF16,
    "attention_4d_padded_kv_bf16": BF16,
    "attention_4d_causal_padded_kv_bf16": BF16,
    "attention_4d_attn_mask_causal_bf16": BF16,
    # Its masked scores (qk_matmul_output_mode 2) hold the lowest float where the specification has -inf.
    "attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": MASKED,
    "attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": MASKED,
    # It wants a mask as long as the keys.
    "attention_4d_diff_heads_mask4d_padded_kv": SHORT,
    # One element of 192 is one float16 ulp off.
    "attention_4d_causal_fp16": ULP,
}
"""What ONNX Runtime 1.32 cannot do on CPU, with the part of its answer that says so."""


def test_cases_are_all_there() -> None:
    count = {
        name: sum(case.operator.name().startswith(f"fxfuse::{name}") for case in CASES)
        for name in ("attention", "layer_norm", "rms_norm", "rotary_embedding", "tensor_scatter")
    }
    if not ERRATA:  # there are fewer of Attention
        assert count.pop("attention") >= 50
    assert (
        count.items()
        <= {"attention": 82, "layer_norm": 19, "rms_norm": 19, "rotary_embedding": 8, "tensor_scatter": 3}.items()
    )


@pytest.mark.parametrize("case", [*CASES, *WINDOWS], ids=lambda case: case.name)
def test_torch_operator(case: Any) -> None:
    outputs = [onnx_cases.to_numpy(output) for output in case.call(*case.inputs)]
    Runner.assert_similar_outputs(case.expected, outputs, case.rtol, case.atol)


class Everything(torch.nn.Module):
    """All cases of one opset in one program: exporting them one by one would take minutes."""

    def __init__(self, cases: list[Any]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = iter(tensors)
        outputs: list[torch.Tensor] = []
        for case in self.cases:
            outputs += case.call(*(None if given is None else next(rest) for given in case.inputs))
        return tuple(outputs)


@cache
def exported(opset: int) -> dict[str, onnx.ModelProto]:
    """The cases of `opset`, each as a model of the one node that our translation wrote for it."""
    cases = [case for case in (*CASES, *WINDOWS) if case.opset == opset]
    tensors = [(case, given) for case in cases for given in case.inputs if given is not None]
    program = torch.onnx.export(
        Everything(cases).eval(),
        tuple(given for _, given in tensors),
        dynamo=True,
        opset_version=opset,
        custom_translation_table=fxfuse.ops.translation_table(opset),
        verbose=False,
    )
    assert program is not None
    graph = program.model_proto.graph
    owner = {value.name: case for value, (case, _) in zip(graph.input, tensors, strict=True)}
    types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    models = {}
    for node in graph.node:
        case = owner[node.input[0]]
        assert case.name not in models, f"{case.name} became more than one node"
        read = [node.output[i] for i in case.outputs]
        own = onnx.helper.make_graph([node], case.name, [types[n] for n in node.input if n], [types[n] for n in read])
        models[case.name] = onnx.helper.make_model(own, opset_imports=[onnx.helper.make_opsetid("", opset)])
    assert len(models) == len(cases)
    return models


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exported_node(case: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the exported nodes run in ONNX Runtime")
    model = exported(case.opset)[case.name]
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def run() -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        given = (onnx_cases.to_numpy(tensor) for tensor in case.inputs if tensor is not None)
        names = (value.name for value in model.graph.input)
        return session.run(None, dict(zip(names, given, strict=True)))

    if case.name in ORT_FAILS:
        with pytest.raises(Exception, match=ORT_FAILS[case.name]):
            Runner.assert_similar_outputs(case.expected, run(), case.rtol, case.atol)
        return
    Runner.assert_similar_outputs(case.expected, run(), case.rtol, case.atol)


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.name)
def test_exported_window(case: Any) -> None:
    """In ONNX's own reference: ONNX Runtime's CPU provider has no kernel of this opset."""
    model = exported(case.opset)[case.name]
    onnx.checker.check_model(model, full_check=True)
    given = (onnx_cases.to_numpy(tensor) for tensor in case.inputs if tensor is not None)
    names = (value.name for value in model.graph.input)
    outputs = ReferenceEvaluator(model).run(None, dict(zip(names, given, strict=True)))
    Runner.assert_similar_outputs(case.expected, outputs, case.rtol, case.atol)
