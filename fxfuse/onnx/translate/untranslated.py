"""Errors of a translation in one sentence. torch.onnx wraps what went wrong in advice for its own developers."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.fx import Node

from fxfuse.errors import FxfuseError
from fxfuse.graph.source import source_line


@contextmanager
def one_message() -> Iterator[None]:
    """Within the block, errors of ``torch.onnx.export`` about a program become an `FxfuseError`.

    Raises:
        FxfuseError: the error that torch's errors were caused by, with the node and the model's line.
    """
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        root = chain[-1]
        if isinstance(root, FxfuseError):  # raised by a translation of ours
            raise root from None
        what = str(root).strip().split("\n")[0] or type(root).__name__
        node = next(filter(None, map(_translated, reversed(chain))), None)
        raise FxfuseError(
            f"torch.onnx cannot translate the program: {what}",
            where=None if node is None else ", ".join(filter(None, (node.name, source_line(node)))),
            hint="custom_translation_table={operator: function} takes a translation of your own"
            if "No ONNX function found" in what
            else None,
        ) from root


def _translated(error: BaseException) -> Node | None:
    """The node at which torch.onnx failed. Its message has only the name that the node got in decomposing, no line."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    nodes = [frame.f_locals.get("node") for frame in reversed(frames)]
    return next((node for node in nodes if isinstance(node, Node)), None)
