"""Patterns by example in graphs that hold whatever torch has: fused or not, and never an error out of `fuse`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import fxfuse
from fxfuse.recognise.catalogue import unregister

WIDTH = 16


def written(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., ::2] = x[..., ::2].relu()
    y[..., 1::2] = F.silu(x[..., 1::2])
    return y.mul_(2)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(x @ x.transpose(-1, -2)).float() @ x


STEPS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "topk": lambda x: x.softmax(-1).topk(2, -1),
    "sort": lambda x: x.sort(-1),
    "unbind": lambda x: torch.stack(x.unbind(-1)[::-1], -1),
    "split": lambda x: x.softmax(-1).split([4, 12], -1),
    "max": lambda x: x.max(-1, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x, -1),
    "cummax": lambda x: x.cummax(-1),
    "written": written,
    "wrapped": without_gradients,
    "cond": lambda x: torch.cond(x.sum() > 0, lambda x: x.softmax(-1), lambda x: x.relu(), (x,)),
    "vmap": lambda x: torch.func.vmap(lambda t: t.softmax(-1) * 2)(x),
    "integers": lambda x: (x.argsort(-1), (x * 3).long() // 2, x > 0),
    "picked": lambda x: x.gather(-1, x.argsort(-1)),
    "scattered": lambda x: x.scatter(-1, x.argmax(-1, keepdim=True), 0.0),
}


class Model(nn.Module):
    def __init__(self, step: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.step, self.linear = step, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.step(self.linear(x)), x.softmax(-1)


@pytest.fixture(scope="module")
def patterns() -> Iterator[list[Any]]:
    """Some are good, some give what is no tensor, raise, or read what is none."""
    functions = {
        "gate": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
        "softmax": lambda x: x.softmax(-1),
        "largest": lambda x: x.topk(2, -1)[0],
        "order": lambda x: x.argsort(-1).float(),
        "several": lambda x: x.chunk(2, -1),
        "affine": lambda x, w, b: F.linear(x, w, b).relu(),
        "picked": lambda x, i: x[i] * 1.0,
        "number": lambda x: x.sum().item(),
    }
    made = []
    for name, function in functions.items():
        function.__name__ = name
        made.append(fxfuse.pattern(replacement=function)(function))
    yield made
    for name in functions:
        unregister(name)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_no_graph_takes_fuse_down(step: str, dynamic: bool, patterns: list[Any]) -> None:
    x = torch.randn(2, 5, WIDTH)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) if dynamic else None
    program = torch.export.export(Model(STEPS[step]).eval(), (x,), dynamic_shapes=shapes)
    made = fxfuse.fuse(program, patterns=patterns)
    assert not any("AssertionError" in str(entry.reason) for entry in fxfuse.report(made))
    torch.testing.assert_close(made.module()(x), program.module()(x), rtol=1e-4, atol=1e-5)
