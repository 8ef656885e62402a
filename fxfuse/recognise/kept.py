"""What a program keeps: parameters, buffers and constants, and what is computed of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fxfuse.graph.view import fake, is_pure, is_size, mutated, op_name, tensor
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.proof.sizes import Sizes

INNER = "access_subclass_inner_tensor"
"""The call that stands for a tensor inside of a weight that is a subclass of Tensor (torchao's are)."""
SMALL = (torch.int8, torch.uint8, torch.int16)
STORED = (*SMALL, torch.int32)
"""Types of integers that weights are kept in; an int32 holds several."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_KEPT = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Kept:
    """The tensors that one program keeps.

    Args:
        frozen: may what they hold be looked at? Only on the way to a file, which holds the same.
        written: targets of what the program writes to.
    """

    def __init__(self, program: ExportedProgram, frozen: bool, written: frozenset[str]) -> None:
        self._values: dict[str, Any] = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind in _KEPT and spec.target not in written and isinstance(spec.target, str):
                value: Any = program.state_dict.get(spec.target)
                self._values[spec.arg.name] = program.constants.get(spec.target) if value is None else value
        self._changed = {root for node in program.graph.nodes for root in mutated(node)}
        self._frozen = frozen
        self._known: dict[Node, bool] = {}

    def __contains__(self, node: Node) -> bool:
        """Is it kept, or computed of nothing but what is?"""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
            elif current in self._changed:
                self._known[current] = False  # what it is depends on when it is read
            elif current.op == "placeholder":
                self._known[current] = current.name in self._values
            elif current.op != "call_function" or not is_pure(current):
                self._known[current] = False
            elif unknown := [i for i in current.all_input_nodes if i not in self._known]:
                stack.extend(unknown)
            else:
                self._known[current] = all(self._known[i] for i in current.all_input_nodes)
        return self._known[node]

    def value(self, node: Node) -> torch.Tensor | None:
        """What it holds; None where that may change, or has no data."""
        if not self._frozen or node not in self:
            return None
        try:
            value = self._value(node)
        except (CannotEvaluate, AttributeError):
            return None
        return None if not isinstance(value, torch.Tensor) or value.is_meta else value.detach()

    def _value(self, node: Node) -> Any:
        evaluator = Evaluator(Sizes({}), exact=False)
        known: dict[Node, Any] = {}
        stack = [node]
        while stack:
            current = stack[-1]
            if current in known:
                stack.pop()
            elif current.op == "placeholder":
                known[current] = self._values[current.name]
            elif unknown := [i for i in current.all_input_nodes if i not in known and not is_size(i)]:
                stack.extend(unknown)
            elif op_name(current) == INNER:
                owner, name = current.args
                known[current] = getattr(known[owner], str(name))  # type: ignore[index]
            else:
                env = {i: known[i] for i in current.all_input_nodes if i in known}
                known[current] = evaluator.run([current], env)[current]
        return known[node]

    def stored(self, nodes: list[Node], kinds: tuple[torch.dtype, ...] = STORED) -> Iterator[Node]:
        """Those of the nodes that are kept tensors of these small types, not computed."""
        for node in nodes:
            value = tensor(node)
            if value is None or value.dtype not in kinds:
                continue
            if (node.op == "placeholder" and node.name in self._values) or (op_name(node) == INNER and node in self):
                yield node


def size_in_bytes(node: Node) -> int:
    """What the tensor takes as it is kept or computed; symbols are not kept."""
    value = fake(node)
    return int(value.numel()) * value.element_size()
