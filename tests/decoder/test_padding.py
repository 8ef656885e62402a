"""What a decoder's graph does about padding, with fewer nodes; and what only looks like it stays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from fxfuse.decoder.export import export_decoder
from fxfuse.decoder.masks.padding import simplify_padding
from fxfuse.parity import require_onnxruntime

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

GATHER = """<ir_version: 10, opset_import: ["" : 24]>
decoder (int64[batch_size, sequence_length] input_ids, int64[batch_size, total_sequence_length] attention_mask)
    => (bool[batch_size, 1, 1, total_sequence_length] y)
    <int64 zero = {0}, int64 one = {1}, int64[3] last = {-1, -2, -3}, int64[1] new = {-1}, int64[1] first = {0}>
{
    rows = Shape <start = 0, end = 1> (attention_mask)
    columns = Shape <start = 1, end = 2> (attention_mask)
    b = Squeeze (rows)
    t = Squeeze (columns)
    row_numbers = Range (zero, b, one)
    row = Unsqueeze (row_numbers, last)
    column = Range (zero, t, one)
    COLUMN
    zeros = Mul (picked, zero)
    rows_again = Add (row, zeros)
    zeros_b = Mul (row, zero)
    columns_again = Add (picked, zeros_b)
    row_index = Unsqueeze (rows_again, new)
    column_index = Unsqueeze (columns_again, new)
    index = Concat <axis = -1> (row_index, column_index)
    mask = MASK (attention_mask)
    found = GatherND (mask, index)
    y = Identity (found)
}"""


def parsed(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    gather = next(node for node in model.graph if node.op_type == "GatherND")
    y = model.graph.outputs[0]
    gather.outputs[0].type, gather.outputs[0].shape = y.type, y.shape
    return model


@pytest.mark.parametrize(
    "column, mask, read",
    [
        ("picked = Identity (column)", "Cast <to = 9>", True),
        ("less = Sub (column, one)\n    picked = Max (less, zero)", "Cast <to = 9>", False),  # the column before
        ("limit = Constant <value_int = 700> ()\n    picked = Min (column, limit)", "Cast <to = 9>", False),
        ("picked = Identity (column)", "seen = Cast <to = 9> (attention_mask)\n    mask = Not", False),
    ],
    ids=["the mask", "shifted", "alike up to 700", "opposite"],
)
def test_a_mask_that_is_looked_up(column: str, mask: str, read: bool) -> None:
    text = GATHER.replace("COLUMN", column)
    if "Not" in mask:
        text = text.replace("mask = MASK (attention_mask)", mask + " (seen)")
    model = parsed(text.replace("MASK", mask))
    simplify_padding(model)
    kinds = [node.op_type for node in model.graph]
    assert (kinds == ["Cast", "Unsqueeze", "Identity"]) if read else ("GatherND" in kinds)


def test_inputs_of_another_kind_are_left_alone() -> None:
    text = GATHER.replace("COLUMN", "picked = Identity (column)").replace("MASK", "Cast <to = 9>")
    model = parsed(text.replace("[batch_size, sequence_length] input_ids", "[batch_size, words] input_ids"))
    before = [node.op_type for node in model.graph]
    simplify_padding(model)
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES, **HEADS), MistralConfig(**SIZES, **HEADS, sliding_window=4)])
def test_rows_that_are_padded(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    program = export_decoder(model)
    kinds = Counter(node.op_type for node in program.graph)
    assert kinds["GatherND"] == 0 and kinds["Transpose"] == 0 and kinds["Where"] <= 3
    ids = torch.randint(0, 64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    session = require_onnxruntime().InferenceSession(
        ir.to_proto(program).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    past: dict[str, np.ndarray] = {
        i.name: np.zeros((2, 2, 0, 8), np.float32) for i in session.get_inputs() if "past" in i.name
    }
    logits = []
    for part in (slice(0, 4), slice(4, 6)):
        feed = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        given = {name: tensor.numpy() for name, tensor in feed.items()}
        outputs = session.run(None, {**given, **past})
        logits.append(outputs[0])
        past = dict(zip(past, outputs[1:], strict=True))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    seen = mask.bool().numpy()
    np.testing.assert_allclose(np.concatenate(logits, 1)[seen], expected.numpy()[seen], rtol=1e-4, atol=1e-5)
