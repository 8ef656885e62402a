"""Which fusions of the original a fused program may be one of: read off the operators that it holds.

Nothing here decides anything. A fusion that is not tried can only lead to a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fxfuse.ops.opsets import FIRST_OPSET, LAST_OPSET
from fxfuse.ops.registry import OPS, PARTS
from fxfuse.options import DEFAULT_OPSET, Options
from fxfuse.recognise.answers import Pattern, Varies
from fxfuse.recognise.declared import opset_of


def attempts(
    original: ExportedProgram,
    fused: ExportedProgram,
    told: Options,
    done: Sequence[ExportedProgram],
) -> Iterator[Options]:
    """How the original may have been fused, the likeliest first.

    Args:
        told: what is known of it.
        done: what came of those that were given so far. Parts of the patterns are tried where all of them fuse more.
    """
    called = [n for n in fused.graph.nodes if n.op == "call_function"]
    sets = list(_variants(told.chosen(LAST_OPSET), called))
    persistent = any(s.kind is InputKind.BUFFER and s.persistent for s in original.graph_signature.input_specs)
    for frozen in (False, True) if persistent else (False,):
        for every in sets:
            opset = max([DEFAULT_OPSET, *map(opset_of, every)])
            option = replace(told, opset=opset, frozen=frozen, of_patterns={})
            yield replace(option, patterns=every)
            if _operators(done[-1]) != _operators(fused):
                for some in _parts(every, called):
                    yield replace(option, patterns=some)


def _variants(patterns: Sequence[Pattern], called: Sequence[Node]) -> Iterator[list[Pattern]]:
    """The patterns with each choice of options of their own that the fused program may come from."""
    choices = [p.variants(called) if isinstance(p, Varies) else [p] for p in patterns]
    for chosen in product(*choices):
        yield list(chosen)


def _operators(program: ExportedProgram) -> Counter[Any]:
    return Counter(n.target for n in program.graph.nodes if n.op == "call_function")


def _parts(every: list[Pattern], called: list[Node]) -> list[list[Pattern]]:
    """The patterns whose operators occur; those of opset 23; all up to each, for what was fused only in part."""
    names: set[str] = set()
    for target in {n.target for n in called}:
        op = OPS.get(target) or PARTS.get(target)  # type: ignore[call-overload]
        if op is not None:
            names.update(op.found_by)
    own = {name for op in (OPS | PARTS).values() for name in (op.onnx_name, *op.found_by)}
    some = [p for p in every if p.operator in names or p.operator not in own]
    older = [p for p in every if p.since_opset <= FIRST_OPSET]
    found: list[list[Pattern]] = []
    for chosen in (some, older, *(every[:end] for end in range(1, len(every)))):
        if chosen != every and chosen not in found:
            found.append(chosen)
    return found
