"""The story of a repair: load the file, apply the rules, run both files against each other, write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.rewriter import RewriteRule

from fxfuse.errors import FxfuseError
from fxfuse.files import move_into, staging
from fxfuse.ops.folders import parts
from fxfuse.ops.opsets import FIRST_OPSET
from fxfuse.repair.verify import Run, verify


def rules() -> list[Any]:
    """What the `repair.py` of the operators' folders mend."""
    return [rule for module in parts("repair") for rule in module.RULES]


@dataclass(frozen=True)
class Repaired:
    """What was done to one file."""

    changes: dict[str, int]
    """How often each rule was applied, by what it does; empty if nothing had to be mended."""
    runs: list[Run]
    """The comparisons in ONNX Runtime; none if nothing was changed, or with `parity=False`."""


def repair(source: str | os.PathLike[str], target: str | os.PathLike[str], *, parity: bool = True) -> Repaired:
    """Write `source` to `target`, and mend fused operators that do not run, or compute more than they need.

    If a rule applies, equal nodes of the file are merged too (the exporter writes a cos for every layer), and unused
    ones removed. Otherwise the file is written as it came.

    Args:
        source: an ONNX file of opset 23 or later, with its external data beside it. It is not changed, unless it is
            the target too.
        target: the file to write, whole or not at all; its weights go to ``target + ".data"`` if those of `source`
            lie outside it.
        parity: run both in ONNX Runtime first (the `ort` extra).

    Raises:
        FxfuseError: `source` is no such file, or `target` cannot be written.
        ParityError: the mended model does not run where the original does, or computes something else. Nothing is
            written then.
    """
    source, target = Path(source), Path(target)
    if target.is_dir():
        raise FxfuseError("the output file is a folder", where=str(target), hint="--out fixed.onnx")
    model = _load(source)
    _add_missing_shapes(model, source)
    changes = {what: count for what, rule in _rules().items() if (count := rule.apply_to_model(model))}
    if changes:
        passes.CommonSubexpressionEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    else:
        model = _load(source)  # again, without the shapes that were inferred for the rules
    with staging(target.absolute().parent, target.name) as folder:
        written = folder / target.name
        try:
            ir.save(model, written, external_data=written.name + ".data" if _external(model) else None)
        except OSError as error:
            raise FxfuseError(f"writing failed: {error.strerror or error}", where=str(target)) from error
        runs = verify(source, written) if changes and parity else []
        move_into(folder, target.absolute().parent, model=target.name)
    return Repaired(changes, runs)


def _rules() -> dict[str, RewriteRule]:
    """The rules, by a sentence that says what each does."""
    return {rule.what: rule.rule() for rule in rules()}


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise FxfuseError("no such file", where=str(path))
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx-ir each raise their own
        raise FxfuseError(f"not an ONNX model: {type(error).__name__}: {error}", where=str(path)) from error
    opset = model.opset_imports.get("")
    if opset is None or opset < FIRST_OPSET:
        raise FxfuseError(
            f"the model is of opset {opset}; the operators that can be mended exist from {FIRST_OPSET} on",
            where=str(path),
            hint="export the PyTorch model with fxfuse.onnx.export",
        )
    absent = sorted({tensor.path for tensor in _external(model) if not os.path.exists(tensor.path)})
    if absent:
        raise FxfuseError(f"external data is missing: {', '.join(absent)}", where=str(path))
    return model


def _external(model: ir.Model) -> Sequence[ir.ExternalTensor]:
    weights = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in weights if isinstance(tensor, ir.ExternalTensor)]


def _add_missing_shapes(model: ir.Model, path: Path) -> None:
    """Gives a type and a shape to values that have none in the file; what the exporter declared is kept."""
    inferred = ir.load(path)
    passes.ShapeInferencePass(check_type=False, strict_mode=False)(inferred)
    known = {value.name: value for node in inferred.graph.all_nodes() for value in node.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            found = known.get(value.name)
            if found is not None:
                value.shape = value.shape if value.shape is not None else found.shape
                value.type = value.type if value.type is not None else found.type
