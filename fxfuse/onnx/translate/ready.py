"""A fused program made ready for torch's translation: what torch.onnx cannot write is replaced by what it can."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.errors import FxfuseError
from fxfuse.fusion import REPORT
from fxfuse.graph.complex.arithmetic import is_complex
from fxfuse.graph.complex.real_parts import without_complex
from fxfuse.graph.program import copy_program
from fxfuse.graph.source import source_line
from fxfuse.graph.splice import trace
from fxfuse.graph.view import tensor
from fxfuse.onnx.translate.takes import untaken
from fxfuse.onnx.translate.unpacked import without_words
from fxfuse.onnx.translate.wide_numbers import without_wide_numbers
from fxfuse.ops.registry import OPS, PARTS
from fxfuse.report.model import Report
from fxfuse.torch_seams import sizes_of_one

_JOINED = torch.ops.aten.view_as_complex.default
"""What parts are put together by, which torch.onnx can write."""


def ready(program: ExportedProgram) -> ExportedProgram:
    """The program as it goes to translation; `program` itself if nothing needs to be changed."""
    return without_wide_numbers(without_complex(without_untaken(without_words(program))))


def without_untaken(program: ExportedProgram) -> ExportedProgram:
    """The program with every fused operator whose types ONNX's operator does not take written out in ATen again.

    A rotation in float64 is an example: RotaryEmbedding has no such type, and a cast would lose the digits that the
    model asks for.

    Returns:
        A new program that shares the weights and whose report says so; `program` itself if there is no such operator.
    """
    if not any(map(_untaken, program.graph.nodes)):
        return program
    result = copy_program(program)
    why: dict[str, str] = {}
    for node in list(result.graph.nodes):
        reason = _untaken(node)
        if reason is not None:
            why[node.name] = f"{reason}: it is written out"
            _write_out(node)
    result.graph.lint()
    result.graph_module.recompile()
    report = result.graph_module.meta.get(REPORT)
    if isinstance(report, Report):
        report = copy.copy(report)
        report.entries = [
            replace(e, status="decomposed", reason=why[e.result]) if e.result in why else e for e in report.entries
        ]
        result.graph_module.meta[REPORT] = report
    return result


def _untaken(node: Node) -> str | None:
    op = (OPS | PARTS).get(cast(Any, node.target)) if node.op == "call_function" else None
    value = None if op is None else tensor(node.all_input_nodes[0])
    return None if op is None or value is None else untaken(op.onnx_name, value.dtype)


def _write_out(node: Node) -> None:
    op = (OPS | PARTS)[cast(Any, node.target)]
    tensors = [a for a in node.args if isinstance(a, Node)]

    def form(*given: torch.Tensor) -> Any:
        values = iter(given)
        args = [next(values) if isinstance(a, Node) else a for a in node.args]
        return op.decomposition(*args, **node.kwargs)

    with sizes_of_one():
        body = trace(form, tensors)
    env: dict[Node, Node] = {}
    inputs = iter(tensors)
    with node.graph.inserting_before(node):
        for new in body.nodes:
            if new.op == "placeholder":
                env[new] = next(inputs)
            elif new.op == "output":
                node.replace_all_uses_with(env[new.args[0]], propagate_meta=False)
            else:
                env[new] = node.graph.node_copy(new, lambda n: env[n])
                env[new].meta = {**node.meta, "val": new.meta["val"]}
    name = node.name
    made = env[body.output_node().args[0]]  # type: ignore[index]
    node.graph.erase_node(node)
    made.name = name  # the outputs and the report refer to it by this name


def check_no_complex(program: ExportedProgram, error: Exception) -> None:
    """If a translation failed and the program computes on complex tensors, say on which operator it failed.

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
