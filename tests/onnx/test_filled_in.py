"""Programs that a pass edited without saying what its new nodes compute."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.onnx.translate.filled_in import with_values


class Net(nn.Module):
    """A norm whose root is taken in a graph of its own; an input that is called like a builtin."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            table = torch.cos(input) + torch.sin(input)
        return input * torch.rsqrt(input.pow(2).mean(-1, keepdim=True) + 1e-6) * 1.5 + table


def edited() -> ExportedProgram:
    """Every `cos` and `mul` goes through a `detach` that has no value; an assertion needs none."""
    program = torch.export.export(Net(), (torch.randn(3, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))
    for module in program.graph_module.modules():
        for node in list(module.graph.nodes):
            if node.target in (torch.ops.aten.cos.default, torch.ops.aten.mul.Tensor):
                with module.graph.inserting_after(node):
                    new = module.graph.call_function(torch.ops.aten.detach.default, (node,))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    with program.graph.inserting_before(program.graph.output_node()):
        program.graph.call_function(torch.ops.aten._assert_async.default, (next(iter(program.graph.nodes)),))
    program.graph_module.recompile()
    return program


def missing(program: ExportedProgram) -> list[str]:
    graphs = [m.graph for m in program.graph_module.modules()]
    return [n.name for g in graphs for n in g.nodes if n.op == "call_function" and "val" not in n.meta]


def test_values_are_filled_in_on_a_copy() -> None:
    program = edited()
    before = missing(program)
    assert len(before) > 3 and len(list(program.graph_module.modules())) > 1
    filled = with_values(program)
    assert missing(filled) == ["_assert_async_default"]
    assert missing(program) == before, "the caller's program is not changed"
    assert str(filled.graph) == str(program.graph) and "%input" in str(filled.graph)
    value = next(n for n in filled.graph.nodes if n.target is torch.ops.aten.detach.default).meta["val"]
    assert isinstance(value.shape[0], torch.SymInt) and value.shape[1] == 8


def test_it_can_be_fused_then() -> None:
    fused = fxfuse.fuse(with_values(edited()))
    x = torch.randn(5, 8)
    torch.testing.assert_close(fused.module()(x), Net()(x))


def test_a_whole_program_is_taken_as_it_is() -> None:
    program = torch.export.export(Net(), (torch.randn(3, 8),))
    assert with_values(program) is program
