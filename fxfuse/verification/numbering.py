"""The values of a program as terms.

What writes in place, draws random numbers or runs code that is not known has its place in a chain: what it does is part
of the state that the next of them meets. What reads a storage that is written to reads it in the state of that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.graph.dead_vmap import brackets
from fxfuse.graph.view import ALIASES, is_random, mutated, op_name, touches
from fxfuse.torch_seams import HigherOrderOperator, OpOverload, schema_of
from fxfuse.verification import spelling
from fxfuse.verification.classes import Head

Make = Callable[[Head, Sequence[int]], int]
_PLAIN = ("_operator", "math")


@dataclass
class Numbering:
    """The terms of one program's nodes."""

    of: dict[Node, int] = field(default_factory=dict)
    """The value of a node."""
    effects: dict[Node, int] = field(default_factory=dict)
    """The state that a node leaves behind."""
    owned: dict[Node, int] = field(default_factory=dict)
    """Values that have a storage of their own that is written to. Two of them are never one, even if they are equal."""
    returned: list[Node] = field(default_factory=list)
    form: Head = None
    """The nesting of the lists that the program returns."""
    final: int = -1
    """The state at the end of the program."""


def number(program: ExportedProgram, make: Make, find: Callable[[int], int]) -> Numbering:
    """Every value of the program as a term that `make` makes and `find` represents."""
    graph = program.graph
    result = Numbering()
    written = {root for node in graph.nodes for root in mutated(node)}
    around = brackets(graph)
    outer = {n: place for place, b in enumerate(around) for n in b.nodes}  # the outermost comes last
    outside = make(("start",), ())
    inside: dict[int, int] = {}
    counts: dict[tuple[Head, tuple[int, ...]], int] = {}
    inputs = 0
    for node in graph.nodes:
        if node.op == "output":
            result.form, result.returned = spelling.structure(node.args[0])
            continue
        bracket = outer.get(node)
        state = outside if bracket is None else inside.setdefault(bracket, make(("bracket",), ()))
        if node.op == "placeholder":
            term = make(("input", inputs), ())
            inputs += 1
        elif node.op == "get_attr":
            term = make(("constant", spelling.content(node)), ())
        else:
            head, read = spelling.call(node)
            if bracket is not None:
                head = ("inside", head)  # within a vmap the same call may run on a batch, and gives something else
            children = [result.of[n] for n in read]
            if has_effect(node):
                state = make(("effect", head), [*children, state, outside])
                result.effects[node] = state
                if bracket is not None:
                    inside[bracket] = state
                if bracket is None or mutated(node) or is_random(node):
                    outside = state
                term = make(("value",), [state])
            else:
                if written and touches(node, written):
                    head, children = ("read", head), [*children, state, outside]
                    if node in written and not _is_view(node):
                        key = head, tuple(map(find, children))
                        counts[key] = counts.get(key, 0) + 1
                        head = ("own", counts[key], head)
                        result.owned[node] = make(head, children)
                term = make(head, children)
        result.of[node] = term
    result.final = outside
    return result


def has_effect(node: Node) -> bool:
    """Does the call do more than compute a value of what it reads?"""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, OpOverload):
        return schema_of(target).is_mutable or is_random(node)
    if isinstance(target, HigherOrderOperator):
        modules = spelling.subgraphs(node)
        return not modules or any(has_effect(n) for module in modules for n in module.graph.nodes)
    name = getattr(target, "__name__", "")
    return not (getattr(target, "__module__", "") in _PLAIN or (name.startswith("sym_") and _of_torch(target)))


def _of_torch(target: object) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == "torch"


def _is_view(node: Node) -> bool:
    """Is it certain to be no storage of its own? `reshape` and `to` copy where they have to."""
    if op_name(node) in ALIASES:
        return op_name(node) == "getitem"
    schema = schema_of(node.target)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)
