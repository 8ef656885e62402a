"""A fused program made ready for torch's translation: what torch.onnx has no way to write is written otherwise."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from fxfuse.errors import FxfuseError
from fxfuse.graph.complex_arithmetic import is_complex
from fxfuse.graph.real_parts import without_complex
from fxfuse.graph.source import source_line

_JOINED = torch.ops.aten.view_as_complex.default
"""What parts are put together by, which torch.onnx can write."""


def ready(program: ExportedProgram) -> ExportedProgram:
    """The program as it goes to translation; `program` itself, where nothing is to be done."""
    return without_complex(program)


def check_no_complex(program: ExportedProgram, error: Exception) -> None:
    """Says which complex operator it was, where the translation failed and there is one.

    Raises:
        FxfuseError: there is an operator on complex tensors without a rule.
    """
    for node in program.graph.nodes:
        if node.op == "call_function" and is_complex(node) and node.target is not _JOINED:
            raise FxfuseError(
                f"ONNX has no complex tensors, and {node.target} on them is known neither to fxfuse nor to torch.onnx",
                where=", ".join(filter(None, (node.name, source_line(node)))),
                hint="compute it on real and imaginary parts (torch.view_as_real), or outside of the model",
            ) from error
