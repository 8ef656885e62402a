"""What a program's constants are, and what is made of them alone: whatever holds for it holds in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fxfuse.graph.view import is_random, is_size, mutated, tensor
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.state.mutations import mutations
from fxfuse.state.writes import Unclear, with_writes

_LIMIT = 400


def written_targets(program: ExportedProgram) -> frozenset[str]:
    """Buffers, parameters, constants and inputs that the program writes to."""
    return frozenset(str(m.target) for m in mutations(program))


def may_change(buffers: Sequence[str]) -> str:
    """Why nothing is concluded from what these buffers hold, and what lets it be."""
    names = ", ".join(map(repr, buffers))
    are = f"the persistent buffer {names}" if len(buffers) == 1 else f"the persistent buffers {names}"
    return f"load_state_dict may change {are} (frozen=True takes it for a constant)"


class Constants:
    """Of one program.

    Args:
        frozen: do persistent buffers keep what they hold?
        written: the targets of what the program writes to.
    """

    def __init__(self, program: ExportedProgram, frozen: bool, written: frozenset[str]) -> None:
        self.values = constant_values(program, frozen, written)
        """Buffers and lifted constants by the names of their placeholders."""
        self._unfrozen = {} if frozen else _persistent(program, written)
        self._contents: dict[Node, str] = {}

    def depends_on_input(self, node: Node) -> bool:
        """Does the value depend on anything but constants and sizes?"""
        try:
            ancestors = ancestors_of([node])
        except CannotEvaluate:
            return True
        return any(
            is_random(n) or (n.op == "placeholder" and tensor(n) is not None and n.name not in self.values)
            for n in ancestors
        )

    def is_fixed(self, node: Node) -> bool:
        """Is it made of constants alone, and of no size that may be another?"""
        if self.depends_on_input(node):
            return False
        values = (n.meta.get("val") for n in ancestors_of([node]))
        return not any(_is_symbolic(d) for v in values for d in (v.shape if isinstance(v, torch.Tensor) else (v,)))

    def may_change(self, nodes: Iterable[Node]) -> list[str]:
        """The persistent buffers, by their paths, that keep the nodes from being constants."""
        found: dict[str, None] = {}
        for node in nodes:
            try:
                leaves = [n for n in ancestors_of([node]) if n.op == "placeholder" and tensor(n) is not None]
            except CannotEvaluate:
                continue
            unknown = [n.name for n in leaves if n.name not in self.values]
            if unknown and all(name in self._unfrozen for name in unknown):
                found.update(dict.fromkeys(self._unfrozen[name] for name in unknown))
        return list(found)

    def loaded(self, nodes: Iterable[Node]) -> list[str]:
        """The persistent buffers, by their paths, that the nodes are computed from, beside whatever else."""
        try:
            return [self._unfrozen[n.name] for n in ancestors_of(nodes) if n.name in self._unfrozen]
        except CannotEvaluate:
            return []

    def content(self, node: Node) -> str:
        """What the node is computed from, spelled out: constants with what they hold, inputs by name."""
        found = self._contents.get(node)
        if found is None:
            try:
                ancestors = ancestors_of([node])
            except CannotEvaluate:
                self._contents[node] = node.name
                return node.name
            for ancestor in ancestors:
                if ancestor not in self._contents:
                    self._contents[ancestor] = self._spelled(ancestor)
            found = self._contents[node]
        return found

    def _spelled(self, node: Node) -> str:
        constant = self.values.get(node.name) if node.op == "placeholder" else None
        if constant is not None and not constant.is_meta:
            value = constant.detach().to("cpu").contiguous()
            held = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
            text = f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(held).hexdigest()}"
        elif node.op != "call_function":
            text = f"{node.op} {node.name}"
        else:
            parts = torch.fx.node.map_arg(
                (node.args, dict(node.kwargs)),
                lambda n: self._contents.get(n) or str(n.meta.get("val", n.name) if is_size(n) else n.name),
            )
            written = f"|{node.name}" if mutated(node) else ""
            text = f"{node.target}{parts}{written}"
        return hashlib.sha256(text.encode()).hexdigest()


def constant_values(program: ExportedProgram, frozen: bool, written: frozenset[str]) -> dict[str, torch.Tensor]:
    """Buffers and lifted constants by placeholder name.

    Parameters are not constants: training changes them. Nor, unless `frozen`, are persistent buffers:
    `load_state_dict` does.
    """
    found: dict[str, torch.Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR) or spec.target in written:
            continue
        if spec.kind == InputKind.BUFFER and spec.persistent and not frozen:
            continue
        value: Any = program.state_dict.get(str(spec.target))
        if value is None:
            value = program.constants.get(str(spec.target))
        if isinstance(value, torch.Tensor):
            found[spec.arg.name] = value
    return found


def _persistent(program: ExportedProgram, written: frozenset[str]) -> dict[str, str]:
    """Persistent buffers that nothing writes to: their paths by the names of their placeholders."""
    return {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.BUFFER and spec.persistent and spec.target not in written
    }


def _is_symbolic(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def ancestors_of(nodes: Iterable[Node]) -> list[Node]:
    """Everything that the tensors are computed from, writes in place included, in graph order.

    Raises:
        CannotEvaluate: too much, or it cannot be told.
    """
    try:
        return with_writes(nodes, _LIMIT)
    except Unclear as error:
        raise CannotEvaluate(str(error)) from error
