"""Makes state that a program writes in place inputs and outputs of it, for ONNX graphs keep nothing between two calls.

buffer ─┬─ index_put_ ─▶ (written in place)          input ── index_put ─┬─ output
        └─ attention …                    becomes                       └─ attention …

1  A constant that is written to is taken for a buffer, and so is a parameter.
2  torch functionalises the program: writes become values, and the signature says which value each buffer ends with.
3  Each such buffer becomes an input, after all others and by name; its last value an output, after all others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
)
from torch.fx import Graph, Node

from fxfuse.errors import FxfuseError
from fxfuse.graph.program import copy_program
from fxfuse.graph.source import source_line
from fxfuse.graph.view import fake, size_text
from fxfuse.quiet import shared_specs
from fxfuse.state.counters import count_from_first
from fxfuse.state.index_copies import slices_as_index_copies
from fxfuse.state.mutations import STATE, WRITES, Mutation, in_place, mutations
from fxfuse.torch_seams import FakeTensor, one_at_a_time, plain_codegen, pytree


@dataclass(frozen=True)
class Lifted:
    """A program that writes nothing in place, and the states that became its inputs and outputs."""

    program: ExportedProgram
    states: tuple[State, ...] = ()


@dataclass(frozen=True)
class State:
    """One tensor that goes in as it was before the call and comes out as it is after it."""

    target: str
    """The path of the buffer (or parameter) in its module, or the name of the input."""
    placeholder: str
    """The name of the graph's input that holds it."""
    initial: torch.Tensor | None
    """What the buffer held when the model was captured; None if the state is an input of the model's own."""
    source: str | None = None
    """The model's line that writes to it."""


def lift(program: ExportedProgram) -> Lifted:
    """`program` with all its state as inputs and outputs; `program` itself if it writes nothing that outlives the call.

    The inputs for buffers come last, as keyword arguments named as their placeholders. The values of all states after
    the call come last among the outputs, in the same order. An input of the model's own that it writes to has an output
    too. `program` is not changed.

    Raises:
        FxfuseError: a write that cannot be lifted; the message names the buffer and the model's line.
    """
    found = mutations(program)
    functional = _functional(program, found) if found else program
    if not _writes(functional):
        return Lifted(program)  # nothing is written, or all of it to copies
    return _as_inputs(functional, {m.placeholder: m.source for m in found})


def check_nothing_dropped(program: ExportedProgram) -> None:
    """Refuses a program that writes to what outlives the call: torch.onnx leaves that out of the graph without a word.

    An input that the program writes to and also returns is no loss, for so its new value comes out.

    Raises:
        FxfuseError: there is such a write; the message names the buffer or input and the model's line.
    """
    found = mutations(program)
    functional = _functional(program, found) if found else program
    returned = set(functional.graph_signature.user_outputs)
    for spec in _writes(functional):
        if spec.kind is OutputKind.USER_INPUT_MUTATION and spec.arg.name in returned:
            continue
        target = str(spec.target)
        what = "input" if spec.kind is OutputKind.USER_INPUT_MUTATION else "buffer"
        raise FxfuseError(
            f"the program writes to {target!r} in place, and torch.onnx would drop that from the graph",
            where=next((m.source for m in found if target in (m.target, m.placeholder)), None) or f"{what} {target!r}",
            hint="fxfuse.onnx.export makes it an output (and a buffer an input too), and so does "
            "fxfuse.state.lift(program)",
        )


def _functional(program: ExportedProgram, found: list[Mutation]) -> ExportedProgram:
    """The program with its writes noted in its signature, and none of them left in its graph.

    Raises:
        FxfuseError: a write has no functional form.
    """
    functional = program if _writes(program) and not _in_place(program) else _functionalised(program, found)
    for node in functional.graph.nodes:
        for root in in_place(functional.graph_module, functional.graph, node):
            _refuse(root.name, functional, source_line(node), f"{node.target} has no functional form")
        if str(node.target).startswith("auto_functionalized"):
            names = {m.placeholder for m in found} & {i.name for i in node.all_input_nodes}
            line = next((m.source for m in found if m.placeholder in names), None)
            _refuse(min(names, default=node.name), functional, line, f"{node.args[0]} has no functional form")
    return functional


def _functionalised(program: ExportedProgram, found: list[Mutation]) -> ExportedProgram:
    prepared = copy_program(program)
    lines = {m.placeholder: m.source for m in found}
    for spec in prepared.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind is InputKind.CONSTANT_TENSOR and name in lines:
            if isinstance(prepared.constants.get(str(spec.target)), FakeTensor):
                _refuse(name, program, lines[name], "the capture lost which tensor of the model it is (`.data`?)")
            spec.kind, spec.persistent = InputKind.BUFFER, False
    try:
        # An empty table: nothing is decomposed, and linear, rms_norm and attention stay what they are.
        with one_at_a_time(), shared_specs():
            functional: ExportedProgram = prepared.run_decompositions({})
        return functional
    except Exception as error:  # whatever functionalisation raises of this program
        first = found[0]
        _refuse(first.placeholder, program, first.source, f"{type(error).__name__}: {error}", error)


def _writes(program: ExportedProgram) -> list[OutputSpec]:
    return [s for s in program.graph_signature.output_specs if s.kind in WRITES]


def _in_place(program: ExportedProgram) -> bool:
    return any(in_place(program.graph_module, program.graph, n) for n in program.graph.nodes)


def _as_inputs(functional: ExportedProgram, lines: dict[str, str | None]) -> Lifted:
    result = copy_program(functional)
    graph, signature = result.graph, result.graph_signature
    writes = [s for s in signature.output_specs if s.kind in WRITES]
    kinds = {getattr(s.arg, "name", ""): s for s in signature.input_specs}
    by_target = {s.target: name for name, s in kinds.items() if s.kind in STATE}
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    values = {n.name: n for n in graph.nodes}
    states = []
    lifted: list[str] = []
    for spec in writes:
        target = str(spec.target)
        placeholder = by_target.get(target, target)
        if placeholder not in kinds:
            _refuse(target, functional, None, "it is no buffer and no input of the program")
        initial = functional.state_dict.get(target, functional.constants.get(target))
        is_buffer = kinds[placeholder].kind in STATE
        held = initial.detach() if is_buffer and initial is not None else None
        states.append(State(target, placeholder, held, lines.get(placeholder)))
        if is_buffer:
            if (size := _resized(nodes[placeholder], values[spec.arg.name])) is not None:
                _refuse(placeholder, functional, lines.get(placeholder), size)
            lifted.append(placeholder)

    # Placeholders: lifted ones behind all others.
    last = list(graph.find_nodes(op="placeholder"))[-1]
    for name in lifted:
        if nodes[name] is not last:
            last.append(nodes[name])
            last = nodes[name]
    inputs = [s for s in signature.input_specs if getattr(s.arg, "name", "") not in lifted]
    inputs += [InputSpec(InputKind.USER_INPUT, kinds[name].arg, None) for name in lifted]

    # Outputs: what the model returns, then the states.
    output = graph.output_node()
    given: Any = output.args[0]
    pairs = list(zip(signature.output_specs, given, strict=True))
    ordered = [p for p in pairs if p[0].kind not in WRITES] + [p for p in pairs if p[0].kind in WRITES]
    returned: list[Node] = []
    for spec, value in ordered:
        if spec.kind in WRITES and (value in returned or value.op == "placeholder"):
            value = _copied(graph, value)
            spec.arg.name = value.name
        returned.append(value)
    output.args = (tuple(returned),)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, s.arg, None) if s.kind in WRITES else s for s, _ in ordered]
    targets = {s.target for s in states if s.initial is not None}
    module = result.graph_module
    plain_codegen(graph)
    module.recompile()
    program = ExportedProgram(
        root=module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={k: v for k, v in functional.state_dict.items() if k not in targets},
        range_constraints=result.range_constraints,
        module_call_graph=_call_graph(result, lifted, states),
        example_inputs=_examples(result, lifted, states),
        constants={k: v for k, v in functional.constants.items() if k not in targets},
        verifiers=result.verifiers,
    )
    program.graph_module.meta.update(functional.graph_module.meta)
    slices_as_index_copies(program)
    final: Any = program.graph.output_node().args[0]
    for state, value in zip(states, final[-len(states) :], strict=True):
        if state.initial is not None:
            count_from_first(program, nodes[state.placeholder], state.initial, value)
    return Lifted(program, tuple(states))


def _resized(before: Node, after: Node) -> str | None:
    """What is wrong with a buffer that has another size after the call; None if it has the size that it had."""
    sizes = [" × ".join(map(size_text, fake(node).shape)) for node in (before, after)]
    return None if sizes[0] == sizes[1] else f"it is [{sizes[0]}] before a call, and [{sizes[1]}] after it"


def _copied(graph: Graph, value: Node) -> Node:
    """A copy of a state's last value, where that is an input or another output as well: in ONNX one value has one name,
    and each output needs its own."""
    with graph.inserting_before(graph.output_node()):
        node = graph.call_function(torch.ops.aten.clone.default, (value,))
    node.meta = {**value.meta}
    return node


@shared_specs()
def _call_graph(program: ExportedProgram, lifted: list[str], states: list[State]) -> list[ModuleCallEntry]:
    """How the root is called: with the lifted tensors by name besides, and giving all states after what it gave
    before."""
    root, *others = copy.deepcopy(program.module_call_graph)
    before = root.signature
    assert before is not None, "an exported program's root has a signature"
    leaf = object()
    args, kwargs = pytree.tree_unflatten([leaf] * before.in_spec.num_leaves, before.in_spec)
    in_spec = pytree.tree_structure((args, {**kwargs, **dict.fromkeys(lifted, leaf)}))
    returned = pytree.tree_unflatten([leaf] * before.out_spec.num_leaves, before.out_spec)
    out_spec = pytree.tree_structure((returned, {s.placeholder: leaf for s in states}))
    names = None if before.forward_arg_names is None else [*before.forward_arg_names, *lifted]
    signature = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec, forward_arg_names=names)
    return [ModuleCallEntry(root.fqn, signature), *others]


def _examples(program: ExportedProgram, lifted: list[str], states: list[State]) -> Any:
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    initial = {s.placeholder: s.initial for s in states}
    return args, {**kwargs, **{name: initial[name] for name in lifted}}


def _refuse(
    name: str, program: ExportedProgram, line: str | None, why: str, cause: Exception | None = None
) -> NoReturn:
    spec = next((s for s in program.graph_signature.input_specs if getattr(s.arg, "name", "") == name), None)
    target = str(spec.target or name) if spec is not None else name
    raise FxfuseError(
        f"the program writes to {target!r} in place, which cannot become an output: {why}",
        where=line or f"buffer {target!r}",
        hint="return the new value from forward instead, and take the old one as an argument",
    ) from cause
