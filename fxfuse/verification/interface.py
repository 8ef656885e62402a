"""What a caller meets of a program: inputs and outputs, weights and constants, sizes and their ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node

from fxfuse.graph.view import tensor
from fxfuse.torch_seams import guards_code
from fxfuse.verification.spelling import bits, is_plain

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def interface_differences(original: ExportedProgram, fused: ExportedProgram) -> Iterator[tuple[str, str]]:
    """What differs, and where, in the order in which a person would look for it."""
    yield from _inputs(original, fused)
    yield from _outputs(original, fused)
    yield from _calling(original, fused)
    yield from _values(original, fused)
    yield from _sizes(original, fused)


def _inputs(original: ExportedProgram, fused: ExportedProgram) -> Iterator[tuple[str, str]]:
    ours, theirs = original.graph_signature.input_specs, fused.graph_signature.input_specs
    if len(ours) != len(theirs):
        yield f"it has {len(theirs)} inputs, weights and constants, the original {len(ours)}", "signature"
        return
    for one, two in zip(ours, theirs, strict=True):
        where = f"input {_name(two)}"
        if one.kind is not two.kind:
            yield f"it is a {_said(two.kind)} where the original has the {_said(one.kind)} {_name(one)}", where
        elif one.target != two.target or one.persistent != two.persistent:
            what = f"it is {two.target} (persistent: {two.persistent})"
            yield f"{what}, in the original {one.target} (persistent: {one.persistent})", where
        elif type(one.arg) is not type(two.arg) or _constant(one.arg) != _constant(two.arg):
            yield f"it is {two.arg}, in the original {one.arg}", where
        elif one.kind not in (*_HELD, InputKind.USER_INPUT) and not _is_one_object(original, fused, one.target):
            yield f"whether a {_said(one.kind)} is the same cannot be told", where
    nodes = [n.name for n in fused.graph.find_nodes(op="placeholder")]
    if nodes != [_name(s) for s in theirs]:
        yield "its signature names other inputs than its graph has", "signature"


def _outputs(original: ExportedProgram, fused: ExportedProgram) -> Iterator[tuple[str, str]]:
    ours, theirs = original.graph_signature.output_specs, fused.graph_signature.output_specs
    if len(ours) != len(theirs):
        yield f"it has {len(theirs)} outputs, the original {len(ours)}", "signature"
        return
    places = _places(original), _places(fused)
    for number, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        targets = [places[i].get(str(s.target), s.target) for i, s in enumerate((one, two))]
        if one.kind is not two.kind or targets[0] != targets[1] or type(one.arg) is not type(two.arg):
            yield (
                f"it is a {_said(two.kind)} of {two.target}, in the original a {_said(one.kind)} of {one.target}",
                f"output {number} ({_name(two)})",
            )
        elif _constant(one.arg) != _constant(two.arg):
            yield f"it is {two.arg}, in the original {one.arg}", f"output {number}"
    given: Any = fused.graph.output_node().args[0]
    names = [n.name for n in given if isinstance(n, Node)]
    if names != [_name(s) for s in theirs if not isinstance(s.arg, ConstantArgument)]:
        yield "its signature names other outputs than its graph gives", "signature"


def _calling(original: ExportedProgram, fused: ExportedProgram) -> Iterator[tuple[str, str]]:
    one, two = (p.module_call_graph[0].signature for p in (original, fused))
    if one is None or two is None:
        if one is not two:
            yield "only one of the two says how it is called", "signature"
    elif one.in_spec != two.in_spec or one.out_spec != two.out_spec or one.forward_arg_names != two.forward_arg_names:
        yield "it is called otherwise than the original, or what it gives is put together otherwise", "signature"
    # torch 2.11 has no guards beside the ranges.
    guards = [set(guards_code(p)) for p in (original, fused)]
    for guard in sorted(guards[0] ^ guards[1]):
        whose = "it does not demand" if guard in guards[0] else "it demands, unlike the original,"
        yield f"{whose} {guard}", "guards"


def _values(original: ExportedProgram, fused: ExportedProgram) -> Iterator[tuple[str, str]]:
    for target in sorted(original.state_dict.keys() ^ fused.state_dict.keys()):
        whose = "the original lacks it" if target in fused.state_dict else "it is missing"
        yield whose, f"state dict, {target}"
    for spec in original.graph_signature.input_specs:
        if spec.kind not in _HELD:
            continue
        one, two = (_held(p, str(spec.target)) for p in (original, fused))
        if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
            if one is not two:
                yield "it is held by only one of the two programs", f"{_said(spec.kind)} {spec.target}"
        elif one is not two and (one.dtype, one.shape) != (two.dtype, two.shape):
            what = f"it is {two.dtype}{list(two.shape)}, in the original {one.dtype}{list(one.shape)}"
            yield what, f"{_said(spec.kind)} {spec.target}"
        elif one is not two and not (is_plain(one) and is_plain(two)):
            yield f"whether a {type(two).__name__} is the same cannot be told", f"{_said(spec.kind)} {spec.target}"
        elif one is not two and bits(one) != bits(two):
            yield _first_difference(one, two), f"{_said(spec.kind)} {spec.target}"


def _sizes(original: ExportedProgram, fused: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Types and shapes of the inputs, symbols that have another name renamed; then their ranges."""
    theirs: dict[sympy.Basic, sympy.Basic] = {}
    pairs = list(
        zip(original.graph.find_nodes(op="placeholder"), fused.graph.find_nodes(op="placeholder"), strict=True)
    )
    for node, other in pairs:
        for one, two in zip(_dims(node), _dims(other), strict=False):
            if one.is_Symbol and two.is_Symbol:
                theirs.setdefault(one, two)
    if len(set(theirs.values())) < len(theirs):
        yield "two sizes that may differ in the original are one", "sizes"
    for node, other in pairs:
        one, two = node.meta.get("val"), other.meta.get("val")
        sizes = [[str(d.xreplace(theirs)) for d in _dims(node)], [str(d) for d in _dims(other)]]
        kinds = [(type(v).__name__, getattr(v, "dtype", None), str(getattr(v, "device", None))) for v in (one, two)]
        if kinds[0][1:] != kinds[1][1:] or sizes[0] != sizes[1]:
            yield f"it is {_shown(two)}, in the original {_shown(one)}", f"input {other.name}"
    ranges = {k.xreplace(theirs): v for k, v in original.range_constraints.items()}
    # Symbols of a program that was loaded may be made with other assumptions: names tell.
    mine, others = ({str(k): v for k, v in r.items()} for r in (ranges, fused.range_constraints))
    for name in sorted(mine.keys() | others.keys()):
        if str(mine.get(name)) != str(others.get(name)):
            yield f"it is in {others.get(name)}, in the original in {mine.get(name)}", f"range of size {name}"


def _dims(node: Node) -> list[sympy.Basic]:
    value = tensor(node)
    sizes: list[Any] = list(value.shape) if value is not None else [node.meta.get("val")]
    kinds = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return [sympy.sympify(s.node.expr) if isinstance(s, kinds) else _plain(s) for s in sizes]


def _plain(size: Any) -> sympy.Basic:
    return sympy.Integer(size) if isinstance(size, int) and not isinstance(size, bool) else sympy.Symbol(f"={size!r}")


def _shown(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _first_difference(one: torch.Tensor, two: torch.Tensor) -> str:
    if not one.is_meta and not two.is_meta:
        differ = ~((one == two) | ((one != one) & (two != two)))
        if bool(differ.any()):
            at = tuple(int(i) for i in differ.nonzero()[0])
            return f"at {list(at)} it is {two[at].item()}, in the original {one[at].item()}"
    return "its bits differ from the original's"


def _held(program: ExportedProgram, target: str) -> Any:
    value = program.state_dict.get(target)
    return program.constants.get(target) if value is None else value


def _is_one_object(original: ExportedProgram, fused: ExportedProgram, target: str | None) -> bool:
    held = original.constants.get(str(target))
    return held is not None and held is fused.constants.get(str(target))


def _places(program: ExportedProgram) -> dict[str, int]:
    """Inputs by name; a written input is named by it."""
    return {_name(spec): place for place, spec in enumerate(program.graph_signature.input_specs)}


def _name(spec: Any) -> str:
    return str(getattr(spec.arg, "name", ""))


def _constant(argument: Any) -> Any:
    return (type(argument.value), argument.value) if isinstance(argument, ConstantArgument) else None


def _said(kind: Any) -> str:
    return str(kind.name).lower().replace("_", " ")
