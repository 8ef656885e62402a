"""Where in the model a node comes from."""

from __future__ import annotations

import linecache
import os
import re

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def source_line(node: Node) -> str | None:
    """``"rms_norm.py:38 in forward: return x * self.scale"``: the innermost frame of the model's own code."""
    frame = _frame(node)
    if frame is None:
        return None
    path, line, function = frame
    code = linecache.getline(path, int(line)).strip()
    return f"{os.path.basename(path)}:{line} in {function}" + (f": {code}" if code else "")


def place_of(node: Node) -> str | None:
    """``"rms_norm.py:38"``"""
    frame = _frame(node)
    return None if frame is None else f"{os.path.basename(frame[0])}:{frame[1]}"


def _frame(node: Node) -> tuple[str, str, str] | None:
    """File, line and function of the innermost frame of the model's own code."""
    frames = _FRAME.findall(node.stack_trace or "")
    # "<eval_with_key>" is code that torch wrote.
    outside = [f for f in frames if f"{os.sep}torch{os.sep}" not in f[0] and not f[0].startswith("<eval")]
    return (outside or frames)[-1] if outside or frames else None


def module_path(node: Node) -> str | None:
    """Path of the innermost module: ``"layers.0.sa_norm"``."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return None
    last = entries[-1]
    return str(last[0] if isinstance(last, tuple) else last) or None
