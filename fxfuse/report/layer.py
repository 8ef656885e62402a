"""One layer of the program before and after fusing, as plain data: what a drawing is made from.

All layers of a decoder look alike, so one is enough: the first of those in which most was fused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Graph, Node

from fxfuse.graph.marks import INSERTED
from fxfuse.graph.source import module_path, source_line
from fxfuse.graph.view import ASSERTIONS, op_name, size_text, tensor

MAX_CALLS = 160
"""Nobody reads a drawing of more calls. Of a longer layer the stretch with the most fused regions is drawn."""
_ENTRY = "fxfuse_entry"
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.|$)")


@dataclass(frozen=True)
class Call:
    """One operation of the graph; sizes, assertions and weights are left out."""

    name: str
    operator: str
    """``"aten.mul.Tensor"``"""
    entry: int | None
    """Which entry of the report took it in (before) or put it in (after); None if it is the same in both."""
    inputs: tuple[str, ...]
    """Names of the tensors it reads, those of other layers included."""
    shape: str | None
    """``"float32[s0, s1, 32]"``"""
    source: str | None

    @property
    def label(self) -> str:
        """``"mul"``"""
        parts = self.operator.split(".")
        return parts[1] if len(parts) == 3 else parts[-1]

    @property
    def fused(self) -> bool:
        return self.operator.startswith("fxfuse.")


@dataclass(frozen=True)
class Layer:
    """The same stretch of the program twice."""

    module: str | None
    """``"layers.0"``; None where no layer is numbered and the whole program, or a part of it, is shown."""
    whole: bool
    """Is the whole layer here, or was it cut to `MAX_CALLS`?"""
    before: tuple[Call, ...]
    after: tuple[Call, ...]


def mark(result: Node, entry: int, replaced: Node) -> None:
    """Note on the nodes just inserted up to `result` which entry of the report they stand for.

    If `replaced` was itself inserted by an earlier entry, the new nodes stand for that one.
    """
    entry = replaced.meta.get(_ENTRY, entry)
    stack = [result]
    while stack:
        node = stack.pop()
        if node.meta.get(INSERTED) and _ENTRY not in node.meta:
            node.meta[_ENTRY] = entry
            stack.extend(node.all_input_nodes)


def calls(graph: Graph) -> list[tuple[Node, list[Node]]]:
    """The operations of a graph with what they read; a node that is erased later forgets its inputs."""
    return [(node, node.all_input_nodes) for node in graph.nodes if _drawn(node)]


def one_layer(
    before: Sequence[tuple[Node, list[Node]]], fused: ExportedProgram, regions: dict[int, tuple[str, ...]]
) -> Layer | None:
    """The layer to draw, or None if nothing was fused.

    Args:
        before: the program's `calls` before fusing.
        fused: the program after it; the inserted nodes are marked with their entries (`mark`).
        regions: the node names of every fused entry, by its index in the report.
    """
    entries = {name: entry for entry, names in regions.items() for name in names}
    outputs = {names[-1]: entry for entry, names in regions.items()}
    layers = {node: _layer(module_path(node)) for node, _ in before}
    counts = Counter(layer for node, layer in layers.items() if node.name in outputs)
    if not counts:
        return None
    numbered = {layer: count for layer, count in counts.items() if layer is not None}
    module = max(numbered, key=lambda layer: numbered[layer]) if numbered else None
    chosen = [(node, inputs) for node, inputs in before if module is None or layers[node] == module]
    stretch = _stretch(chosen, outputs)
    names = {node.name for node, _ in stretch}
    shown = {entry for name, entry in outputs.items() if name in names}
    parameters = set(fused.graph_signature.inputs_to_parameters)
    return Layer(
        module,
        whole=len(stretch) == len(chosen),
        before=tuple(_call(node, inputs, entries.get(node.name), parameters) for node, inputs in stretch),
        after=tuple(
            _call(node, inputs, node.meta.get(_ENTRY), parameters)
            for node, inputs in calls(fused.graph)
            if node.name in names or node.meta.get(_ENTRY) in shown
        ),
    )


def _layer(path: str | None) -> str | None:
    """``"model.layers.3"`` of ``"model.layers.3.mlp.experts.0"``: up to the first number."""
    match = _NUMBERED.match(path or "")
    return match[0] if match else None


def _stretch(chosen: list[tuple[Node, list[Node]]], outputs: dict[str, int]) -> list[tuple[Node, list[Node]]]:
    """At most `MAX_CALLS` in a row, with as many outputs of regions among them as can be."""
    if len(chosen) <= MAX_CALLS:
        return chosen
    seen = [0]
    for node, _ in chosen:
        seen.append(seen[-1] + (node.name in outputs))
    start = max(range(len(chosen) - MAX_CALLS + 1), key=lambda i: seen[i + MAX_CALLS] - seen[i])
    return chosen[start : start + MAX_CALLS]


def _drawn(node: Node) -> bool:
    value = node.meta.get("val")
    computes = tensor(node) is not None or isinstance(value, (list, tuple))
    return node.op == "call_function" and computes and op_name(node) not in ASSERTIONS


def _call(node: Node, reads: list[Node], entry: int | None, parameters: set[str]) -> Call:
    value = tensor(node)
    shape = None
    if value is not None:
        sizes = ", ".join(size_text(size) for size in value.shape)
        shape = f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    inputs = tuple(
        i.name
        for i in reads
        if (tensor(i) is not None or isinstance(i.meta.get("val"), (list, tuple))) and i.name not in parameters
    )
    operator = str(node.target) if op_name(node) != "getitem" else "getitem"
    return Call(node.name, operator, entry, inputs, shape, source_line(node))
