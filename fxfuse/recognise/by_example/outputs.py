"""An example of several results: which values of the graph are its others, and which of its results are enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from fxfuse.graph.region import Region, real_users, too_early
from fxfuse.graph.view import DETACHED, is_pure, is_size, op_name, tensor
from fxfuse.proof.evaluate import CannotEvaluate, Evaluator
from fxfuse.torch_seams import make_fx

_NEARBY = 400
"""How many nodes are looked through for other results."""


def with_others(
    region: Region,
    evaluator: Evaluator,
    inputs: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor],
    same: Callable[[torch.Tensor, torch.Tensor], bool],
) -> Region | None:
    """The region that computes the other results of its example too, as far as somebody reads them.

    Args:
        region: computes one of the results.
        inputs: values of its inputs.
        results: what the example gives for them, but for the one.
        same: are two values the same?

    Returns:
        None where the graph has none of the others, or where one replacement in one place cannot give them all.
    """
    nearby = _computed_from(region)
    values = _values(evaluator, region, nearby, inputs)
    found: list[Node] = []
    for result in results:
        for node in nearby:
            taken = node is region.output or node in found or node not in values
            if not taken and _is_read(node, region) and same(values[node], result):
                found.append(node)
                break
    return _joined(region, found) if found else None


def _is_read(node: Node, region: Region) -> bool:
    """By something outside of the region?"""
    inside = set(region.nodes)
    return any(u not in inside for u in real_users(node))


def _computed_from(region: Region) -> list[Node]:
    """What is computed of the region's inputs alone, in graph order."""
    view = region.view
    known = set(region.inputs)
    found = []
    start = min(view.order[n] for n in region.nodes)
    for node in view.nodes[start : start + _NEARBY]:
        read = [i for i in node.all_input_nodes if not is_size(i)]
        if node in known or not read or not is_pure(node) or not all(i in known for i in read):
            continue
        known.add(node)
        found.append(node)
    return found


def _values(
    evaluator: Evaluator, region: Region, nodes: Sequence[Node], inputs: Sequence[torch.Tensor]
) -> dict[Node, torch.Tensor]:
    """As far as they can be run."""
    known: dict[Node, Any] = dict(zip(region.inputs, inputs, strict=True))
    for node in nodes:
        if all(i in known or is_size(i) for i in node.all_input_nodes):
            try:
                known[node] = evaluator.run([node], known)[node]
            except CannotEvaluate:
                continue
    return {n: v for n, v in known.items() if isinstance(v, torch.Tensor)}


def _joined(region: Region, others: Sequence[Node]) -> Region | None:
    """One region for all outputs; None where what reads one of them comes before another can be computed."""
    view = region.view
    inside, stack = set(region.nodes), list(others)
    while stack:
        node = stack.pop()
        if node in region.inputs or node in inside or is_size(node):
            continue
        inside.add(node)
        stack.extend(node.all_input_nodes)
    if any(
        DETACHED in n.meta or (tensor(n) is None and not isinstance(n.meta.get("val"), (list, tuple))) for n in inside
    ):
        return None
    *more, last = view.sorted([region.output, *others])
    inside = {n for n in inside if view.order[n] <= view.order[last]}
    joined = replace(region, output=last, more_outputs=tuple(more), nodes=tuple(view.sorted(inside)))
    start, stop = view.order[joined.nodes[0]], view.order[last]
    if view.mutations and view.mutated_between([*region.inputs, *joined.nodes], start, stop):
        return None
    early = too_early(joined)
    if any(not is_pure(n) or n in region.inputs for n in early) or (early and view.mutations):
        return None
    return joined


def covers(example: Callable[..., Any], inputs: Sequence[torch.Tensor], chosen: Sequence[int]) -> bool:
    """Is everything that the example computes computed for the chosen results? What only picks one is no work."""
    with torch.no_grad():
        graph: Graph = make_fx(example)(*inputs).graph
    results = graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    needed: set[Node] = set()
    stack = [results[i] for i in chosen]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    live: set[Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return all(n in needed or n.op != "call_function" or op_name(n) in _PICKS for n in live)


_PICKS = frozenset(["getitem", "detach", "alias"])
