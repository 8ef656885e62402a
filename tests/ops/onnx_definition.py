"""An operator as ONNX defines it: the body that the standard gives it, in plain operators, run by onnx's reference.

Where the standard has no body (TensorScatter), onnx's reference implementation is the definition.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

import fxfuse.ops

TYPES = {
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
}


def defined(
    op: Any, args: tuple[Tensor | None, ...], attributes: dict[str, Any], opset: int, as_type: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """What the definition of `op` at that opset gives for this call.

    Args:
        as_type: define it for tensors of this type, whatever is given: of float64, that of a type without it.
    """
    described = tuple(None if a is None else (TYPES[_type(a, as_type)], a.dim()) for a in args)
    record = fxfuse.ops.OPS[op]
    count = len(op._schema.returns)
    evaluator = _evaluator(record.onnx_name, described, tuple(attributes.items()), opset, count)
    names = [given.name for given in onnx.defs.get_schema(record.onnx_name, opset, "").inputs]
    feeds = {name: to_numpy(arg) for name, arg in zip(names, args, strict=False) if arg is not None}
    with np.errstate(all="ignore"):
        return tuple(to_torch(np.asarray(output)) for output in evaluator.run(None, feeds))


def _type(tensor: Tensor, as_type: torch.dtype | None) -> torch.dtype:
    return as_type if as_type is not None and tensor.is_floating_point() else tensor.dtype


@cache
def _evaluator(
    name: str, described: tuple[Any, ...], attributes: tuple[Any, ...], opset: int, count: int
) -> ReferenceEvaluator:
    schema = onnx.defs.get_schema(name, opset, "")
    names = [i.name if given is not None else "" for i, given in zip(schema.inputs, described, strict=False)]
    while not names[-1]:
        names.pop()
    outputs = [output.name for output in schema.outputs][:count]
    node = onnx.helper.make_node(name, names, outputs, **dict(attributes))
    types = [
        onnx.helper.make_tensor_type_proto(*((onnx.TensorProto.FLOAT, None) if d is None else (d[0], ["?"] * d[1])))
        for d in described[: len(names)]
    ]
    nodes, version = [node], opset
    if schema.has_context_dependent_function:
        # As onnx.inliner does it, which cannot where an optional input is left out in the middle.
        version = max(v for v in schema.context_dependent_function_opset_versions if v <= opset)
        described_types = [kind.SerializeToString() for kind in types]
        body = schema.get_context_dependent_function_with_opset_version(
            version, node.SerializeToString(), described_types
        )
        function = onnx.FunctionProto.FromString(body)
        nodes = list(function.node)
        assert len(nodes) > 1, "the definition needs more to be known"
    else:
        assert not schema.has_function
    inputs = [onnx.helper.make_value_info(n, kind) for n, kind in zip(names, types, strict=True) if n]
    graph = onnx.helper.make_graph(nodes, "body", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)]))


def to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def assert_within(actual: Tensor, wanted: Tensor, bound: Tensor, what: str = "") -> None:
    """Every element equal but for its own bound; nan and infinities in the same places.

    Args:
        bound: of each element, in float64.
    """
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, f"{what}: {actual.dtype} {wanted.dtype}"
    ours, theirs = actual.double(), wanted.double()
    off = torch.where((ours == theirs) | (ours.isnan() & theirs.isnan()), 0.0, (ours - theirs).abs())
    bad = (off > 0.0) & ~(off <= bound) | off.isnan()
    if bad.any():
        places = bad.nonzero()
        at = tuple(places[0].tolist())
        raise AssertionError(
            f"{what}: {len(places)} of {bad.numel()} elements differ, at {list(at)} {ours[at]:g}, "
            f"defined is {theirs[at]:g}, allowed {bound.expand(bad.shape)[at]:g}"
        )


MAGNITUDES = (1e-6, 1e-3, 1.0, 1e3, 1e6)


def drawn(kind: float | str, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers of that magnitude, no larger than the type has them; "outlier": one feature; "zeros"."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "outlier":
        x[..., -1] *= 1e4
    elif kind == "zeros":
        x = x * 0.0
    else:
        x = x * float(kind)
    limit = torch.finfo(dtype).max / 4
    return x.clamp(-limit, limit).to(dtype)


DRAWS = (*MAGNITUDES, "outlier", "zeros")


def ulp(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def smallest(dtype: torch.dtype) -> float:
    """The distance of the numbers next to 0."""
    return float(torch.finfo(dtype).smallest_normal) * ulp(dtype)


def single(number: float) -> float:
    """The number that an attribute of ONNX holds: a float32."""
    return float(np.float32(number))
