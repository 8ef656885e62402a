"""Running an ONNX model in ONNX Runtime's CPU provider, and what to do where it has no kernels (bfloat16)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxfuse.errors import FxfuseError
from fxfuse.installed import check_installed

Model = str | os.PathLike[str] | torch.onnx.ONNXProgram

PREVIEW = "ai.onnx.preview"
LARGE = 1 << 30
"""Bytes of weights from which on ONNX Runtime must not make second copies of them."""


class OnnxRuntime:
    """A session on the CPU; call it with tensors, in the order of the graph's inputs.

    Args:
        model: a file (with its external data beside it), or a program, which is written to a temporary folder.
        quiet: do not let ONNX Runtime print its errors beside raising them.

    Raises:
        FxfuseError: onnxruntime is not installed, or does not load the model.
    """

    def __init__(self, model: Model, *, quiet: bool = False) -> None:
        ort = require_onnxruntime()
        with tempfile.TemporaryDirectory() as folder:
            path = _as_file(model, folder)
            options = ort.SessionOptions()
            options.log_severity_level = 4 if quiet else 3
            # Products with quantised weights in float32, as the file says; by default activations go to 8 bits too.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            if _size(path) > LARGE:
                # Folding 16-bit weights to float32 and packing them for the GEMMs would each hold another copy.
                options.add_session_config_entry("session.disable_prepacking", "1")
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
                disabled = ["ConstantFolding"]
            else:
                disabled = []
            try:
                self.session = ort.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
                )
            except Exception as error:  # onnxruntime's exceptions have no common base
                raise FxfuseError(f"ONNX Runtime does not load the model: {error}", where=str(path)) from error

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The outputs, on the CPU.

        Raises:
            FxfuseError: ONNX Runtime fails while it runs.
        """
        names = [i.name for i in self.session.get_inputs()]
        if len(names) != len(inputs):
            raise FxfuseError(f"the ONNX graph has {len(names)} inputs ({', '.join(names)}), not {len(inputs)}")
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        try:
            outputs = self.session.run(None, feed)
        except Exception as error:
            raise FxfuseError(f"ONNX Runtime fails to run the model: {error}") from error
        return [torch.from_numpy(np.asarray(output)) for output in outputs]


def open_session(path: Path, dtype: torch.dtype) -> tuple[str, Callable[..., list[torch.Tensor]]]:
    """What runs the file in ONNX Runtime, and what to call it.

    A bfloat16 model runs as its float32 twin; FlexAttention of ai.onnx.preview as the function that onnx says it is.

    Args:
        path: a model, with its external data beside it.
        dtype: what the model computes in.

    Raises:
        FxfuseError: onnxruntime is not installed, or does not load the model.
    """
    with _flex_attention_inlined(path) as written:
        inlined = ["FlexAttention inlined"] if written != path else []
        if dtype != torch.bfloat16:
            return _name(inlined), OnnxRuntime(written)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            twin = Path(folder) / "twin.onnx"
            float32_twin(written, twin)
            session = OnnxRuntime(twin)
    return _name(["f32", *inlined]), lambda *inputs: session(*(_float32(t) for t in inputs))


def _name(notes: Sequence[str]) -> str:
    return f"ONNX Runtime ({', '.join(notes)})" if notes else "ONNX Runtime"


@contextmanager
def _flex_attention_inlined(path: Path) -> Iterator[Path]:
    """Within the block, a file beside `path` (for its weights are there) in which the operator is written out, as
    ONNX Runtime has no kernel for it; `path` itself where it holds none."""
    import onnx
    import onnx.inliner

    model = onnx.load(str(path), load_external_data=False)
    if not any(opset.domain == PREVIEW for opset in model.opset_import):
        yield path
        return
    inlined = path.with_name(f"{path.stem}.inlined.onnx")
    try:
        model = onnx.inliner.inline_selected_functions(
            model, [(PREVIEW, "FlexAttention")], inline_schema_functions=True
        )
        onnx.save(model, str(inlined))
        yield inlined
    finally:
        inlined.unlink(missing_ok=True)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def onnxruntime_outputs(model: Model, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of `model` in ONNX Runtime on the CPU; see `OnnxRuntime`, which runs several inputs."""
    return OnnxRuntime(model)(*inputs)


def check_onnx(model: Model) -> None:
    """The ONNX checker with full shape inference.

    Raises:
        FxfuseError: the graph is not valid ONNX.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = _as_file(model, folder)
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise FxfuseError(f"not a valid ONNX model: {error}", where=str(path)) from error


def float32_twin(
    model: Model, path: str | os.PathLike[str], narrow: Sequence[ir.DataType] = (ir.DataType.BFLOAT16,)
) -> None:
    """Writes `model` to `path` with every tensor, weight, cast and type of the `narrow` types made float32.

    ONNX Runtime's CPU provider has no bfloat16 kernels; the twin is the same graph and the same weights, and what it
    computes is what the graph means, less the rounding.
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded = ir.load(_as_file(model, folder))
        graphs = [loaded.graph, *(function.graph for function in loaded.functions.values())]
        for graph in graphs:
            for value in (*graph.inputs, *graph.initializers.values()):
                _widen_value(value, narrow)
            for node in ir.traversal.RecursiveGraphIterator(graph):
                _widen_node(node, narrow)
        ir.save(loaded, path, external_data=Path(path).name + ".data")


_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision")


def _widen_node(node: ir.Node, narrow: Sequence[ir.DataType]) -> None:
    for value in node.outputs:
        _widen_value(value, narrow)
    for name, attribute in list(node.attributes.items()):
        if name in _DTYPE_ATTRIBUTES and attribute.value in narrow:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in narrow:
            node.attributes[name] = ir.AttrTensor(name, _widen_tensor(attribute.value))
        elif attribute.type == ir.AttributeType.GRAPH:
            for value in (*attribute.value.inputs, *attribute.value.initializers.values()):
                _widen_value(value, narrow)


def _widen_value(value: ir.Value, narrow: Sequence[ir.DataType]) -> None:
    if value.dtype in narrow:
        value.dtype = ir.DataType.FLOAT
    if value.const_value is not None and value.const_value.dtype in narrow:
        value.const_value = _widen_tensor(value.const_value)


def _widen_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    # Made when it is written and dropped after that: the weights are never in memory twice.
    make: Callable[[], Any] = lambda: ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)  # noqa: E731
    return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.numpy().shape), name=tensor.name)


def _as_file(model: Model, folder: str) -> Path:
    if isinstance(model, torch.onnx.ONNXProgram):
        path = Path(folder) / "model.onnx"
        model.save(path, external_data=True)
        return path
    return Path(model)


def _size(path: Path) -> int:
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def require_onnxruntime() -> Any:
    """The module.

    Raises:
        FxfuseError: it is not installed, or too old.
    """
    check_installed("ort")
    try:
        import onnxruntime
    except ImportError as error:
        raise FxfuseError("onnxruntime is not installed", hint="pip install 'fxfuse[ort]'") from error
    return onnxruntime
