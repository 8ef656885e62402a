"""The mended file and the original, run against each other in ONNX Runtime at batch 1 and 2.

If the original does not load, because of mixed types, both are compared with all 16-bit floats widened to float32:
these are the same graphs and weights without the rounding. If the original fails at batch 2, it is run at batch 1, row
by row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import onnx_ir as ir
import torch

from fxfuse.errors import FxfuseError, ParityError
from fxfuse.parity import OnnxRuntime, Result, check_onnx, compare, float32_twin, require_onnxruntime

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Inputs = list[torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One set of inputs through both files."""

    batch: int
    against: str
    """What the mended file was compared with: ``"the original"``, the original row by row, or its float32 twin; or why
    it was compared with nothing."""
    result: Result | None
    """None if there was nothing to compare with."""


def verify(source: Path, mended: Path) -> list[Run]:
    """Runs both.

    Raises:
        FxfuseError: onnxruntime is not installed, or loads neither file.
        ParityError: the mended file is not valid ONNX, does not run where it should, or computes something else.
    """
    reason = _invalid(mended)
    if reason is not None and _invalid(source) is None:
        raise ParityError(f"the mended model is not valid: {reason}", where=str(source))
    original = _session(source)
    if original is not None:
        return _compare_all(original, _must_load(mended), mended, "the original")
    with tempfile.TemporaryDirectory(dir=mended.parent) as folder:
        twins = [Path(folder) / f"{name}.onnx" for name in ("original", "mended")]
        for path, twin in zip((source, mended), twins, strict=True):
            float32_twin(path, twin, NARROW)
        native = _session(mended)
        if native is not None:  # a file of 16-bit floats has to run as it is too, not only widened
            for batch in _batches(mended):
                _must_run(native, _draw(mended, batch), batch)
        note = "the original, which does not load, in float32"
        return _compare_all(_session(twins[0]), OnnxRuntime(twins[1], quiet=True), twins[1], note)


def _compare_all(original: OnnxRuntime | None, session: OnnxRuntime, mended: Path, note: str) -> list[Run]:
    return [_compare(original, session, mended, batch, note) for batch in _batches(mended)]


def _compare(original: OnnxRuntime | None, session: OnnxRuntime, mended: Path, batch: int, note: str) -> Run:
    inputs = _draw(mended, batch)
    if original is None:
        _must_run(session, inputs, batch)
        return Run(batch, "nothing: the original does not load, in no type", None)
    expected = _run(original, inputs)
    if expected is None and batch > 1:
        rows = [_run(original, row) for row in _rows(mended, inputs, batch)]
        if all(row is not None for row in rows):
            expected = [torch.cat(parts) for parts in zip(*(row for row in rows if row is not None), strict=True)]
            note += ", row by row, since it fails at this batch"
    if expected is None:
        runs = "only the mended one runs" if _run(session, inputs) is not None else "neither file runs"
        return Run(batch, f"nothing: {runs} on random inputs", None)
    result = compare(expected, _must_run(session, inputs, batch))
    if not result.passed:
        raise ParityError(
            f"the mended model does not compute what the original does: {result.reason}", where=f"batch {batch}"
        )
    return Run(batch, note, result)


def _invalid(path: Path) -> str | None:
    """Why the ONNX checker refuses the file; None if it does not."""
    try:
        check_onnx(path)
    except FxfuseError as error:
        return error.what
    return None


def _session(path: Path) -> OnnxRuntime | None:
    """A session of the file; None if ONNX Runtime does not load it."""
    require_onnxruntime()
    try:
        return OnnxRuntime(path, quiet=True)
    except FxfuseError:
        return None


def _run(session: OnnxRuntime, inputs: Inputs) -> list[torch.Tensor] | None:
    """The outputs; None if the run fails."""
    try:
        return session(*inputs)
    except FxfuseError:
        return None


def _must_load(path: Path) -> OnnxRuntime:
    try:
        return OnnxRuntime(path, quiet=True)
    except FxfuseError as error:
        raise ParityError(f"the original loads, the mended model does not: {error.what}") from error


def _must_run(session: OnnxRuntime, inputs: Inputs, batch: int) -> list[torch.Tensor]:
    try:
        return session(*inputs)
    except FxfuseError as error:
        raise ParityError(f"the mended model fails: {error.what}", where=f"batch {batch}") from error


def _graph_inputs(path: Path) -> list[ir.Value]:
    graph = ir.load(path).graph
    return [value for value in graph.inputs if value.name not in graph.initializers]


def _batches(path: Path) -> list[int]:
    """The batch sizes to run at: 1 and 2, or the one that is fixed in the file."""
    first = [value.shape[0] for value in _graph_inputs(path) if value.shape is not None and len(value.shape)]
    fixed = [size for size in first if isinstance(size, int)]
    return [1, 2] if len(fixed) < len(first) else fixed[:1] or [1]


def _draw(path: Path, batch: int) -> Inputs:
    """Random inputs. Integers are 0 or 1, which are valid as token ids, as masks and as positions."""
    generator = torch.Generator().manual_seed(batch)
    values = _graph_inputs(path)
    sizes = _bindings(values, batch)
    inputs = []
    for value in values:
        shape = [_size(dim, axis, sizes, batch) for axis, dim in enumerate(value.shape or ())]
        dtype = _TORCH.get(value.dtype) if value.dtype is not None else None
        if dtype is None:
            raise FxfuseError(
                f"no inputs of type {value.dtype} can be drawn", where=f"input {value.name}", hint="use --no-parity"
            )
        if dtype.is_floating_point:
            inputs.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            inputs.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return inputs


def _bindings(values: Iterable[ir.Value], batch: int) -> dict[str, int]:
    """A size for every symbol in the inputs' shapes: the batch for first dimensions, small distinct sizes for
    others."""
    sizes: dict[str, int] = {}
    others = count(5)
    dims = [(axis, dim) for value in values for axis, dim in enumerate(value.shape or ())]
    for axis, dim in sorted(dims, key=lambda pair: pair[0]):
        for symbol in sorted(dim.free_symbols()) if isinstance(dim, ir.SymbolicDim) else ():
            if symbol not in sizes:
                sizes[symbol] = batch if axis == 0 else next(others)
    return sizes


def _size(dim: int | ir.SymbolicDim, axis: int, sizes: dict[str, int], batch: int) -> int:
    if isinstance(dim, int):
        return dim
    size = dim.evaluate(sizes) if dim.value is not None else None
    return size if isinstance(size, int) else (batch if axis == 0 else 5)


def _rows(path: Path, inputs: Inputs, batch: int) -> Iterable[Inputs]:
    """The inputs, one sequence of the batch at a time."""
    for i in range(batch):
        yield [
            tensor[i : i + 1] if value.shape is not None and isinstance(value.shape[0], ir.SymbolicDim) else tensor
            for value, tensor in zip(_graph_inputs(path), inputs, strict=True)
        ]


_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
}
