"""Complex tensors as two real ones: ONNX has no complex type, and its exporter knows few complex operators.

    f ── index ── conj ── view_as_real        becomes        f ── view_as_real ─┬─ select 0 ── index ─────────┐
                                                                                └─ select 1 ── index ── neg ──┴─ stack

What has no rule stays complex: its parts are taken of what it computes, and put together again for it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.complex.arithmetic import Arithmetic, NoRule, Parts, aten, is_complex
from fxfuse.graph.complex.rules import FLAG, parts_of, real_result
from fxfuse.graph.emit import Emitter
from fxfuse.graph.program import copy_program
from fxfuse.graph.view import ASSERTIONS, fake, is_pure, mutated, op_name, tensor, touches
from fxfuse.torch_seams import is_erased


class RealParts:
    """The parts of complex nodes of one graph, each put into it once, behind the node that it stands for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.added: list[Node] = []
        self.unknown: set[Node] = set()
        """Calls without a rule."""
        self._known: dict[Node, Parts] = {}
        self._order = {n: i for i, n in enumerate(graph.nodes)}
        self._written = {root for node in graph.nodes if op_name(node) != FLAG for root in mutated(node)}

    def of(self, node: Node) -> Parts:
        """The parts of a complex node, of inputs and calls without a rule as views of what they are."""
        for n in self._behind(node):
            if n not in self._known:
                self._known[n] = self._read(n)
        return self._known[node]

    def result(self, node: Node) -> Node | None:
        """What a real node with complex operands computes, computed of their parts; None where there is no rule."""
        if touches(node, self._written):
            return None
        operands = [n for n in node.all_input_nodes if is_complex(n)]
        for operand in operands:
            self.of(operand)
        if op_name(node) == "view_as_real" and all(map(self.is_whole, operands)):
            return None
        do = Arithmetic(node, self._known.__getitem__)
        try:
            found = real_result(node, do)
        except Exception:  # no rule, or whatever an operator raises for parts
            _undo(do)
            return None
        self.added.extend(do.emit.added)
        return found

    def together(self, node: Node, reader: Node) -> Node:
        """A complex node put together of its parts, before one that reads it."""
        do = Arithmetic(node, self._known.__getitem__, before=reader)
        made = do.emit.call(aten.view_as_complex.default, do.joined(self.of(node)))
        self.added.extend(do.emit.added)
        return made

    def is_whole(self, node: Node) -> bool:
        """Is it an input, or a call without a rule?"""
        return node.op != "call_function" or node in self.unknown

    def _behind(self, node: Node) -> list[Node]:
        """The complex nodes that `node` comes from, itself included, in graph order."""
        seen, pending = {node}, [node]
        while pending:
            for i in pending.pop().all_input_nodes:
                if is_complex(i) and i not in seen and i not in self._known:
                    seen.add(i)
                    pending.append(i)
        return sorted(seen, key=self._order.__getitem__)

    def _read(self, node: Node) -> Parts:
        do = Arithmetic(node, self._known.__getitem__)
        try:
            if node.op != "call_function" or touches(node, self._written):
                raise NoRule("an input, or written to in place")
            if any(tensor(i) is None and i in self.unknown for i in node.all_input_nodes):
                raise NoRule("taken from a list without parts")
            found = parts_of(node, do)
            if not any(isinstance(p, Node) for p in found):
                raise NoRule("a number")
        except Exception:  # no rule, or whatever an operator raises for parts
            _undo(do)
            found = self._whole(node)
        self.added.extend(do.emit.added)
        return found

    def _whole(self, node: Node) -> Parts:
        if node.op == "call_function":
            self.unknown.add(node)
        if tensor(node) is None:
            return node, node  # a list has no parts: each element that is taken from it has
        emit = Emitter(node)
        resolved = emit.call(aten.resolve_conj.default, node) if fake(node).is_conj() else node
        pairs = emit.call(aten.view_as_real.default, resolved)
        found = emit.call(aten.select.int, pairs, -1, 0), emit.call(aten.select.int, pairs, -1, 1)
        self.added.extend(emit.added)
        return found


def _undo(do: Arithmetic) -> None:
    for node in reversed(do.emit.added):
        node.graph.erase_node(node)
    do.emit.added.clear()


def real_tables(graph: Graph, inserted: Iterable[Node]) -> None:
    """What fused operators read of complex tensors is computed of real ones; what nobody else reads goes."""
    reads = [n for n in inserted if op_name(n) == "view_as_real"]
    if not reads:
        return
    parts = RealParts(graph)
    behind = {n for read in reads for n in parts._behind(read.all_input_nodes[0])}
    parted = [user for read in reads for user in read.users]
    for read in reads:
        _replace(parts, read)
    _remove_unread([*parts.added, *behind, *reads, *parted])


def without_complex(program: ExportedProgram) -> ExportedProgram:
    """The program with real tensors instead of complex ones, but for inputs, outputs and calls without a rule.

    Returns:
        A new program that shares the weights; `program` itself, where it computes nothing that is complex.
    """
    if not any(is_complex(n) for n in program.graph.nodes):
        return program
    result = copy_program(program)
    graph = result.graph
    parts, nodes = RealParts(graph), list(graph.nodes)
    names: dict[str, str] = {}
    for node in nodes:
        if not any(map(is_complex, node.all_input_nodes)):
            continue
        if op_name(node) in ASSERTIONS:
            graph.erase_node(node)
        elif node.op == "call_function" and not is_complex(node):
            names.update(_replace(parts, node))
    for node in nodes:
        if is_complex(node):
            parts.of(node)  # to know whether there is a rule
    for node in (n for n in nodes if n in parts.unknown or not is_complex(n)):
        if op_name(node) in ASSERTIONS:
            continue
        for operand in node.all_input_nodes:
            if is_complex(operand) and not parts.is_whole(operand) and tensor(operand) is not None:
                made = parts.together(operand, node)
                node.replace_input_with(operand, made)
                if node.op == "output":
                    names[operand.name] = made.name
    _remove_unread([*parts.added, *(n for n in nodes if n.graph is graph and not is_erased(n))])
    for spec in result.graph_signature.output_specs:
        spec.arg.name = names.get(spec.arg.name, spec.arg.name)
    graph.lint()
    result.graph_module.recompile()
    return result


def _replace(parts: RealParts, node: Node) -> dict[str, str]:
    """Puts what a real node computes of parts in its place; gives the new names by the old ones."""
    names = {}
    (operand, *_) = node.all_input_nodes
    for user in list(node.users):
        at = _part(node, user)
        part = None if at is None or parts.is_whole(operand) else parts.of(operand)[at]
        if isinstance(part, Node):
            user.replace_all_uses_with(part, propagate_meta=False)
            names[user.name] = part.name
    new = parts.result(node)
    if new is not None:
        node.replace_all_uses_with(new, propagate_meta=False)
        names[node.name] = new.name
    return names


def _part(node: Node, user: Node) -> int | None:
    """Which part a user of `view_as_real` takes; None where it takes something else."""
    if op_name(node) != "view_as_real" or op_name(user) != "select":
        return None
    axis, at = user.args[1:3]
    return int(at) % 2 if isinstance(at, int) and axis in (-1, fake(node).dim() - 1) else None


def _remove_unread(candidates: Iterable[Node]) -> None:
    pending = list(dict.fromkeys(candidates))
    erased: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in erased or node.users or not (is_pure(node) or op_name(node) == FLAG):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased.add(node)
        pending.extend(inputs)
