"""Writes in place are read as what they compute, bit by bit, and leave as they came where nothing took them in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxfuse.graph.program import copy_program, name_outputs
from fxfuse.graph.view import mutated
from fxfuse.state.functional import functionalise, restore

from .writes import KEPT, WRITES, Write


class Written(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(x)


@pytest.mark.parametrize("free", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_reads_what_it_computes(write: Write, free: bool) -> None:
    x = torch.randn(3, 5, 16)
    axes = ({0: Dim.AUTO, 1: Dim.AUTO},) if free else None
    program = copy_program(torch.export.export(Written(write), (x,), dynamic_shapes=axes))
    before = str(program.graph)
    written = functionalise(program.graph)
    name_outputs(program)
    program.graph.lint()
    program.graph_module.recompile()
    assert any(mutated(n) for n in program.graph.nodes) == (write in KEPT), program.graph
    for shape in ((3, 5, 16), (2, 7, 16)) if free else ((3, 5, 16),):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x.clone()), write(x.clone()), rtol=0, atol=0)
    restore(program.graph, written)
    name_outputs(program)
    assert str(program.graph) == before
