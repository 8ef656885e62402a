"""Modules in training mode: captured as in evaluation mode where that is the same program, and refused otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.errors import FxfuseError
from fxfuse.graph.source import source_line
from fxfuse.graph.view import argument

_FLAGS = {"dropout": "train", "feature_dropout": "train", "alpha_dropout": "train", "feature_alpha_dropout": "train"}


def in_training(module: torch.nn.Module) -> list[str]:
    """The parts that are in training mode, by their paths."""
    return [name or "the module itself" for name, part in module.named_modules() if part.training]


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Within the block all parts are in evaluation mode.

    The flags are set directly, for a model may have an `eval` of its own that does something else.
    """
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def check_nothing_trains(
    module: torch.nn.Module, parts: Sequence[str], evaluated: ExportedProgram, capture: Callable[[], ExportedProgram]
) -> None:
    """Compares the capture in evaluation mode with one of the module as it is.

    Raises:
        FxfuseError: they are two programs, and the message has where they part.
    """
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    where = f"{type(module).__qualname__}: {parts[0]}{more}"
    hint = "call .eval() on it first"
    try:
        trained = capture()
    except Exception as error:
        raise FxfuseError(
            "the module is in training mode, in which it cannot be captured", where=where, hint=hint
        ) from error
    for a, b in zip(_calls(evaluated), _calls(trained), strict=False):
        if _spelled(a) != _spelled(b):
            line = source_line(b) or b.name
            raise FxfuseError(
                f"the module is in training mode, where it computes something else: {b.target} at {line}",
                where=where,
                hint=hint,
            )
    if len(_calls(evaluated)) != len(_calls(trained)):
        raise FxfuseError("the module is in training mode, where it computes something else", where=where, hint=hint)


def _calls(program: ExportedProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr")]


def _spelled(node: Node) -> str:
    """The call as text, without the training flag of a dropout with p=0, which drops nothing in either mode."""
    name = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
    args = node.args
    if name in _FLAGS and argument(node, "p") == 0:
        args = args[:1]
    return f"{node.op} {node.target}({args}, {dict(node.kwargs)})"
