"""What each rule takes and what it leaves, on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from fxfuse.errors import FxfuseError
from fxfuse.parity import OnnxRuntime, onnxruntime_outputs
from fxfuse.repair import Repaired, repair


def save(text: str, path: Path) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23]> {text}')
    onnx.save(model, path)
    return path


def mended(text: str, folder: Path) -> tuple[Repaired, list[str], Path]:
    """What was changed, the operators in order, and the file."""
    done = repair(save(text, folder / "model.onnx"), folder / "fixed.onnx")
    nodes = [node.op_type for node in onnx.load(str(folder / "fixed.onnx")).graph.node]
    return done, nodes, folder / "fixed.onnx"


# [b,2,s,8] → [b,2,1,s,8] → [b,2,2,s,8] → [b,4,s,8]
REPEATS = {
    "Unsqueeze, Expand": """
        k5 = Unsqueeze (k, two) k6 = Expand (k5, group) k4 = Reshape (k6, merged)
        v5 = Unsqueeze (v, two) v6 = Expand (v5, group) v4 = Reshape (v6, merged)""",
    "Unsqueeze, Tile": """
        k5 = Unsqueeze (k, two) k6 = Tile (k5, group) k4 = Reshape (k6, merged)
        v5 = Unsqueeze (v, two) v6 = Tile (v5, group) v4 = Reshape (v6, merged)""",
    "Reshape, Expand": """
        k5 = Reshape (k, split) k6 = Expand (k5, group) k4 = Reshape (k6, merged)
        v5 = Reshape (v, split) v6 = Expand (v5, group) v4 = Reshape (v6, merged)""",
}


@pytest.mark.parametrize("steps", REPEATS.values(), ids=REPEATS)
def test_repeats_however_spelled(steps: str, tmp_path: Path) -> None:
    text = f"""
        f (float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v) => (float[b,4,s,8] y)
        <int64[1] two = {{2}}, int64[5] group = {{1, 1, 2, 1, 1}}, int64[5] split = {{0, 2, 1, -1, 8}},
         int64[4] merged = {{0, 4, -1, 8}},
         float[b,2,1,s,8] k5, float[b,2,1,s,8] v5, float[b,2,2,s,8] k6, float[b,2,2,s,8] v6,
         float[b,4,s,8] k4, float[b,4,s,8] v4>
        {{ {steps} y = Attention (q, k4, v4) }}"""
    done, nodes, path = mended(text, tmp_path)
    assert nodes == ["Attention"] and len(done.changes) == 1
    inputs = [torch.randn(3, heads, 5, 8) for heads in (4, 2, 2)]
    (expected,) = onnxruntime_outputs(tmp_path / "model.onnx", inputs)
    torch.testing.assert_close(onnxruntime_outputs(path, inputs)[0], expected)


def test_one_key_head_for_all(tmp_path: Path) -> None:
    text = """
        f (float[b,4,s,8] q, float[b,1,s,8] k, float[b,1,s,8] v) => (float[b,4,s,8] y)
        <int64[4] group = {1, 4, 1, 1}, float[b,4,s,8] k4, float[b,4,s,8] v4>
        { k4 = Expand (k, group) v4 = Expand (v, group) y = Attention (q, k4, v4) }"""
    assert mended(text, tmp_path)[1] == ["Attention"]


def test_repeats_of_a_cache_that_was_joined_before(tmp_path: Path) -> None:
    """As transformers has it: past and new keys joined, then repeated."""
    text = """
        f (float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v, float[b,2,p,8] pk, float[b,2,p,8] pv)
        => (float[b,4,s,8] y, float[b,2,t,8] nk, float[b,2,t,8] nv)
        <int64[1] two = {2}, int64[5] group = {1, 1, 2, 1, 1}, int64[4] merged = {0, 4, -1, 8},
         float[b,2,1,t,8] k5, float[b,2,1,t,8] v5, float[b,2,2,t,8] k6, float[b,2,2,t,8] v6,
         float[b,4,t,8] k4, float[b,4,t,8] v4>
        { nk = Concat <axis = 2> (pk, k) nv = Concat <axis = 2> (pv, v)
          k5 = Unsqueeze (nk, two) k6 = Expand (k5, group) k4 = Reshape (k6, merged)
          v5 = Unsqueeze (nv, two) v6 = Expand (v5, group) v4 = Reshape (v6, merged)
          y = Attention (q, k4, v4) }"""
    done, nodes, _ = mended(text, tmp_path)
    assert nodes == ["Concat", "Concat", "Attention"]
    assert all(run.result is not None and run.result.passed for run in done.runs)


def test_heads_in_another_order_stay_repeated(tmp_path: Path) -> None:
    """`repeat` instead of `repeat_interleave`: query head 1 reads key head 1, not 0."""
    text = """
        f (float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v) => (float[b,4,s,8] y)
        <int64[1] one = {1}, int64[5] group = {1, 2, 1, 1, 1}, int64[4] merged = {0, 4, -1, 8},
         float[b,1,2,s,8] k5, float[b,1,2,s,8] v5, float[b,2,2,s,8] k6, float[b,2,2,s,8] v6,
         float[b,4,s,8] k4, float[b,4,s,8] v4>
        { k5 = Unsqueeze (k, one) k6 = Expand (k5, group) k4 = Reshape (k6, merged)
          v5 = Unsqueeze (v, one) v6 = Expand (v5, group) v4 = Reshape (v6, merged)
          y = Attention (q, k4, v4) }"""
    done, nodes, _ = mended(text, tmp_path)
    assert done.changes == {} and nodes.count("Expand") == 2


def test_keys_repeated_and_values_not_stay_as_they_are(tmp_path: Path) -> None:
    text = """
        f (float[b,4,s,8] q, float[b,2,s,8] k, float[b,4,s,8] v) => (float[b,4,s,8] y)
        <int64[1] two = {2}, int64[5] group = {1, 1, 2, 1, 1}, int64[4] merged = {0, 4, -1, 8},
         float[b,2,1,s,8] k5, float[b,2,2,s,8] k6, float[b,4,s,8] k4>
        { k5 = Unsqueeze (k, two) k6 = Expand (k5, group) k4 = Reshape (k6, merged) y = Attention (q, k4, v) }"""
    assert mended(text, tmp_path)[0].changes == {}


def test_a_cache_of_repeated_heads_stays_one(tmp_path: Path) -> None:
    text = """
        f (float[b,4,s,8] q, float[b,2,s,8] k, float[b,2,s,8] v, float[b,4,p,8] pk, float[b,4,p,8] pv)
        => (float[b,4,s,8] y, float[b,4,t,8] nk, float[b,4,t,8] nv)
        <int64[1] two = {2}, int64[5] group = {1, 1, 2, 1, 1}, int64[4] merged = {0, 4, -1, 8},
         float[b,2,1,s,8] k5, float[b,2,1,s,8] v5, float[b,2,2,s,8] k6, float[b,2,2,s,8] v6,
         float[b,4,s,8] k4, float[b,4,s,8] v4>
        { k5 = Unsqueeze (k, two) k6 = Expand (k5, group) k4 = Reshape (k6, merged)
          v5 = Unsqueeze (v, two) v6 = Expand (v5, group) v4 = Reshape (v6, merged)
          y, nk, nv = Attention (q, k4, v4, , pk, pv) }"""
    assert mended(text, tmp_path)[0].changes == {}


def test_position_ids_of_batch_one(tmp_path: Path) -> None:
    text = """
        f (float[b,s,16] x, float[32,4] cos, float[32,4] sin, int64[1,s] positions) => (float[b,s,16] y)
        { y = RotaryEmbedding <num_heads = 2> (x, cos, sin, positions) }"""
    done, nodes, path = mended(text, tmp_path)
    assert nodes.count("Expand") == 1 and [run.batch for run in done.runs] == [1, 2]
    x, cos, sin = torch.randn(3, 5, 16), torch.randn(32, 4), torch.randn(32, 4)
    positions = torch.randperm(32)[None, :5]
    (y,) = onnxruntime_outputs(path, [x, cos, sin, positions])
    rows = [onnxruntime_outputs(tmp_path / "model.onnx", [row[None], cos, sin, positions])[0] for row in x]
    torch.testing.assert_close(y, torch.cat(rows))


@pytest.mark.parametrize("batch", ["b", "1"])
def test_cos_for_every_sequence_or_for_the_only_one_is_well(batch: str, tmp_path: Path) -> None:
    text = f"""
        f (float[{batch},s,16] x, float[{batch},s,4] cos, float[{batch},s,4] sin) => (float[{batch},s,16] y)
        {{ y = RotaryEmbedding <num_heads = 2> (x, cos, sin) }}"""
    assert mended(text, tmp_path)[0].changes == {}


@pytest.mark.parametrize("x, scale, y", [("float", "float16", "float"), ("float16", "float", "float")])
def test_the_result_has_the_type_that_the_file_declares(x: str, scale: str, y: str, tmp_path: Path) -> None:
    text = f"""
        f ({x}[b,16] x, {scale}[16] w) => ({y}[b,16] y) {{ y = RMSNormalization <epsilon = 1e-5> (x, w) }}"""
    _, nodes, path = mended(text, tmp_path)
    assert nodes.count("RMSNormalization") == 1 and nodes.count("Cast") == 1
    dtypes = {"float": torch.float32, "float16": torch.float16}
    inputs = torch.randn(3, 16).to(dtypes[x]), torch.rand(16).to(dtypes[scale])
    (result,) = onnxruntime_outputs(path, list(inputs))
    expected = torch.nn.functional.rms_norm(inputs[0].float(), (16,), inputs[1].float(), 1e-5)
    torch.testing.assert_close(result, expected.to(dtypes[y]))


def test_the_mend_of_rope_is_needed(tmp_path: Path) -> None:
    """Or else ONNX Runtime has learnt to broadcast, and the rule can go."""
    text = """
        f (float[b,s,16] x, float[1,s,4] cos, float[1,s,4] sin) => (float[b,s,16] y)
        { y = RotaryEmbedding <num_heads = 2> (x, cos, sin) }"""
    path = save(text, tmp_path / "model.onnx")
    with pytest.raises(FxfuseError, match="cos_cache"):
        OnnxRuntime(path, quiet=True)(torch.randn(2, 5, 16), torch.randn(1, 5, 4), torch.randn(1, 5, 4))
