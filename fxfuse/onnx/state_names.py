"""The names of lifted state in an ONNX graph: which output is the next call's input, so that the two may share memory.

    state                                         input                       output
    a cache that attention number N reads         past_key_values.N.key       present.N.key
    any other buffer, by its path                 layers.0.count              present.layers.0.count
    an input that is written to                   as it is called             present.<that>

The pairs of names are written into the model's metadata (`fxfuse.decoder.description`), as a cache of the form "state".
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from fxfuse.decoder.description import CacheDescription
from fxfuse.graph.view import LAYOUT, GraphView, fake, tensor
from fxfuse.recognise.walk import chain_back
from fxfuse.state.lift import State

_ATTENTION = frozenset(
    getattr(torch.ops.fxfuse, name).default for name in ("attention", "attention_with_present", "attention_with_qk")
)


def name_states(model: ir.Model, fused: ExportedProgram, states: tuple[State, ...]) -> list[tuple[State, str, str]]:
    """Name the inputs and outputs that `fxfuse.state.lift` added (the last ones of the graph), and write down the
    pairs.

    Returns:
        Every state with the names of its input and its output.
    """
    if not states:
        return []
    layers = _layers(fused, states)
    buffers = [s for s in states if s.initial is not None]
    first_input, first_output = len(model.graph.inputs) - len(buffers), len(model.graph.outputs) - len(states)
    taken = {v.name for v in (*model.graph.inputs[:first_input], *model.graph.outputs[:first_output])}
    inputs = {s.target: value for s, value in zip(buffers, model.graph.inputs[first_input:], strict=True)}
    tensors = {n.name for n in fused.graph.find_nodes(op="placeholder") if tensor(n) is not None}
    given = [name for name in fused.graph_signature.user_inputs if name in tensors]
    named = dict(zip(given, model.graph.inputs, strict=True))  # by position: the caller may have renamed them
    pairs = []
    for state, output in zip(states, model.graph.outputs[first_output:], strict=True):
        value = inputs.get(state.target) or named[state.placeholder]
        if state.initial is not None:
            value.name = layers.get(state.target, state.target)
            if value.name in taken:
                value.name += ".state"
        was = str(value.name)
        is_cache = was.startswith("past_key_values.")
        present = was.replace("past_key_values", "present", 1) if is_cache else f"present.{was}"
        output.name = present
        pairs.append((state, was, present))
    CacheDescription("state", (), aliases={present: was for _, was, present in pairs}).write(model)
    return pairs


def _layers(fused: ExportedProgram, states: tuple[State, ...]) -> dict[str, str]:
    """The names of states that an attention reads as its keys or values."""
    view = GraphView(fused.graph)
    ends = fused.graph_signature.user_outputs[-len(states) :]
    targets = {name: state.target for name, state in zip(ends, states, strict=True)}
    found: dict[str, str] = {}
    layer = 0
    for node in view.nodes:
        if node.target not in _ATTENTION:
            continue
        pair = [_state(view, operand, targets) for operand in node.args[1:3]]
        if pair[0] is not None and pair[1] is not None and not set(pair) & set(found):
            found[pair[0]], found[pair[1]] = (f"past_key_values.{layer}.{what}" for what in ("key", "value"))
            layer += 1
    return found


def _state(view: GraphView, operand: Any, targets: dict[Any, str]) -> str | None:
    if not isinstance(operand, Node):
        return None
    way = chain_back(view, operand, lambda name: name in LAYOUT)
    return next((targets[n.name] for n in way if n.name in targets and fake(n).dim() == 4), None)
