"""An export graph as text that is the same in every run and with every torch.

A line a call: what it gives, the operator with the arguments that are not at their defaults, dtype and shape. Values
are numbered by operator in the order in which they are computed; sizes that are free are letters, given in the order in
which the inputs have them. Left out: assertions, nodes that only give a size (it is written where it is used), slices
that cut nothing off (some torches write them, others do not), devices, and whatever nothing reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from fxfuse.graph.spelled import cut_whole
from fxfuse.graph.view import ASSERTIONS, is_size, mutated, op_name, tensor
from fxfuse.patterns.flex_attention.calls import flex
from fxfuse.verification.spelling import arguments, subgraphs, target_name

_UNSAID = frozenset(["device", "layout", "pin_memory", "memory_format", "copy", "non_blocking", "implicit"])
"""Arguments that say where and how, not what."""
_UNNAMED = frozenset(["other", "exponent", "size", "shape", "dims", "equation"])
"""Arguments that are plain without their names; so is every tensor that comes before the first that is left out."""
_SHORT = {"scaled_dot_product_attention": "sdpa"}
"""What values are called that would have long names."""
_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}


@dataclass
class Names:
    """What values and sizes are called in one text."""

    letters: str = "BSTUVW"
    """Of the sizes that are free, in the order in which they are met."""
    values: dict[Node, str] = field(default_factory=dict)
    sizes: dict[Any, Any] = field(default_factory=dict)
    """Of a symbol the one with a letter for its name."""
    counts: Counter[str] = field(default_factory=Counter)

    def call(self, node: Node, stem: str) -> str:
        """``"mul"``, ``"mul_2"``, …: how many there were before."""
        self.counts[stem] += 1
        self.values[node] = stem if self.counts[stem] == 1 else f"{stem}_{self.counts[stem]}"
        return self.values[node]

    def size(self, size: Any) -> str:
        """A size in letters; a symbol that is met for the first time gets the next one."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self.sizes:
                self.sizes[symbol] = type(symbol)(self.letters[len(self.sizes)], **symbol.assumptions0)
        return str(expression.xreplace(self.sizes))

    def tensor(self, value: torch.Tensor) -> str:
        """``"float32[B, S, 8]"``"""
        return f"{_dtype(value.dtype)}[{', '.join(self.size(size) for size in value.shape)}]"


def graph_text(program: ExportedProgram, names: Names | None = None) -> str:
    """The graph of a program, its inputs first; `names` learns what the text calls each node."""
    names = names if names is not None else Names()
    graph = program.graph
    live = _read(graph)
    lines = []
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node, spec in zip(inputs, program.graph_signature.input_specs, strict=True):
        if node not in live and spec.kind is not InputKind.USER_INPUT:
            continue
        kind = _KINDS.get(spec.kind, "input")
        stem = {"input": node.name, "constant": "constant"}.get(kind, str(spec.target))  # torch numbers its constants
        value = tensor(node)
        given = names.tensor(value) if value is not None else names.size(node.meta.get("val"))
        lines.append((f"{names.call(node, stem)}: {kind}", given + _one_number(program, spec)))
    lines += _body(graph, live, names)
    return _columns(lines)


def _body(graph: Graph, live: set[Node], names: Names) -> Iterator[tuple[str, str]]:
    for node in graph.nodes:
        if node.op == "output":
            yield f"return {_value(node.args[0], names).removeprefix('[').removesuffix(']')}", ""
        if node.op != "call_function" or node not in live or is_size(node) or op_name(node) in ASSERTIONS:
            continue
        if (whole := cut_whole(node)) is not None:
            names.values[node] = names.values[whole]
            continue
        if op_name(node) == "getitem":
            names.values[node] = f"{_value(node.args[0], names)}[{node.args[1]}]"
            continue
        inside = subgraphs(node)
        given = _given(node, names)
        value = node.meta.get("val")
        kinds = value if isinstance(value, (list, tuple)) else [value]
        kinds = kinds[:1] if flex(node) is not None else kinds  # the others are sums that hardly anybody reads
        shapes = ", ".join(names.tensor(v) for v in kinds if isinstance(v, torch.Tensor))
        yield f"{names.call(node, _stem(node))} = {given}", shapes
        for module in inside:
            for left, right in _inside(node, module, names):
                yield f"    {left}", right


def _inside(node: Node, module: GraphModule, names: Names) -> Iterator[tuple[str, str]]:
    """A subgraph: its arguments, and what it does."""
    own, called = Names(names.letters, sizes=names.sizes), _module_name(node, module)
    stems = {"score_mod": ["score", "b", "h", "q", "kv"], "mask_mod": ["b", "h", "q", "kv"]}.get(called, [])
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = [own.call(n, stems[i] if i < len(stems) else "captured") for i, n in enumerate(inputs)]
    yield f"{called}({', '.join(given)}):", ""
    for left, right in _body(module.graph, _read(module.graph), own):
        yield f"    {left}", right


def _module_name(node: Node, module: GraphModule) -> str:
    call = flex(node)
    if call is not None:
        return "score_mod" if module is call.score_mod else "mask_mod"
    return "block"


def _given(node: Node, names: Names) -> str:
    """The operator and its arguments."""
    call = flex(node)
    if call is not None:
        tensors = [call.query, call.key, call.value, *call.score_buffers, *call.mask_buffers]
        return f"flex_attention({', '.join(_value(v, names) for v in tensors)}, scale={number(call.scale)})"
    schema = getattr(node.target, "_schema", None)
    defaults = {} if schema is None else {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    written = []
    skipped = False
    for name, value, _ in arguments(node):
        if name in _UNSAID or (name in defaults and _same(value, defaults[name])) or _is_open(name, value):
            skipped = True
            continue
        text = _value(value, names)
        if text:
            plain = not skipped and (name in _UNNAMED or _is_tensor(value))
            written.append(text if plain else f"{name}={text}")
    return f"{_operator(node)}({', '.join(written)})"


def _operator(node: Node) -> str:
    """``"mul"``, ``"fxfuse.rms_norm"``: without overload, and only fxfuse's own operators with their namespace."""
    namespace, _, _ = target_name(node.target).partition("::")
    return f"fxfuse.{op_name(node)}" if namespace == "fxfuse" else op_name(node)


def _stem(node: Node) -> str:
    return _SHORT.get(op_name(node), op_name(node))


def _is_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_tensor(v) for v in value)
    return isinstance(value, Node) and tensor(value) is not None


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, Node) and type(value) is type(default) and bool(value == default)


def _is_open(name: str, value: Any) -> bool:
    """Is it the start or the end of a slice that is not cut there?"""
    return isinstance(value, int) and ((name == "start" and value == 0) or (name == "end" and value > 2**62))


def _value(value: Any, names: Names) -> str:
    if isinstance(value, Node):
        if is_size(value):
            return names.size(value.meta["val"])
        return names.values.get(value, "")  # a subgraph is written below the call
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v, names) for v in value)}]"
    if isinstance(value, torch.dtype):
        return _dtype(value)
    return number(value)


def number(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_number(program: ExportedProgram, spec: Any) -> str:
    """`` = 0.5``, where a constant or buffer is a single number."""
    held = program.constants.get(spec.target) if spec.kind is not InputKind.PARAMETER else None
    return f" = {number(held.item())}" if isinstance(held, torch.Tensor) and held.numel() == 1 else ""


def _read(graph: Graph) -> set[Node]:
    """The nodes that the outputs are computed from, and those that write in place to what is read."""
    stack = [n for n in graph.nodes if n.op == "output" or (mutated(n) and n.op == "call_function")]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(n for n in _inputs(node) if not is_size(n))
    return found


def _inputs(node: Node) -> list[Node]:
    """What it reads; of a call of flex_attention without the lists of its block mask."""
    call = flex(node)
    if call is None:
        return node.all_input_nodes
    given = [call.query, call.key, call.value, *call.score_buffers, *call.mask_buffers]
    return [value for value in given if isinstance(value, Node)]


def _columns(lines: list[tuple[str, str]]) -> str:
    """Dtypes and shapes one under another, but for lines that are long by themselves."""
    width = max((len(left) for left, right in lines if right and len(left) <= 76), default=0)
    return "".join(f"{left.ljust(width)}  {right}".rstrip() + "\n" for left, right in lines)
