"""A fused program that was tampered with is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

import fxfuse
from fxfuse.graph.program import copy_program
from tests.proof.programs_to_verify import Block, calls, fused, original, tanh_gelu

aten = torch.ops.aten


def give(name: str, place: int = 0, **attributes: Any) -> Callable[[ExportedProgram], None]:
    """Set attributes of a call."""

    def tamper(program: ExportedProgram) -> None:
        node = calls(program, name)[place]
        node.kwargs = {**node.kwargs, **attributes}

    return tamper


def swap(name: str, one: int, two: int) -> Callable[[ExportedProgram], None]:
    def tamper(program: ExportedProgram) -> None:
        node = calls(program, name)[0]
        args = list(node.args)
        args[one], args[two] = args[two], args[one]
        node.args = tuple(args)

    return tamper


def argument(name: str, place: int, value: Any) -> Callable[[ExportedProgram], None]:
    """Give a call something else: a value, or what the placeholder of a name holds."""

    def tamper(program: ExportedProgram) -> None:
        node = calls(program, name)[0]
        args = list(node.args)
        found = [n for n in program.graph.nodes if n.name == value]
        args[place] = found[0] if isinstance(value, str) else value
        node.args = tuple(args)

    return tamper


def delete(name: str) -> Callable[[ExportedProgram], None]:
    def tamper(program: ExportedProgram) -> None:
        node = calls(program, name)[0]
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)

    return tamper


def insert(operator: Any, after: str, read: bool = True) -> Callable[[ExportedProgram], None]:
    def tamper(program: ExportedProgram) -> None:
        node = calls(program, after)[0]
        with program.graph.inserting_after(node):
            new = program.graph.call_function(operator, (node,))
        new.meta = dict(node.meta)
        if read:
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
            for spec, value in zip(
                program.graph_signature.output_specs, program.graph.output_node().args[0], strict=True
            ):
                spec.arg.name = value.name

    return tamper


def state(target: str) -> Callable[[ExportedProgram], None]:
    def tamper(program: ExportedProgram) -> None:
        value = program.state_dict[target].detach().clone()
        flat = value.reshape(-1)
        flat[1] = not flat[1] if value.dtype == torch.bool else torch.nextafter(flat[1], torch.tensor(9.0))
        program._state_dict = {**program.state_dict, target: value}

    return tamper


def constant(program: ExportedProgram) -> None:
    name = next(n for n, v in program.constants.items() if v.is_floating_point() and v.numel() > 1)
    program._constants = {**program.constants, name: program.constants[name] * 2}


def outputs(program: ExportedProgram) -> None:
    output = program.graph.output_node()
    output.args = (tuple(reversed(output.args[0])),)
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        spec.arg.name = value.name


def unwritten(program: ExportedProgram) -> None:
    (node,) = calls(program, "add_.")[:1]
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)


def written_earlier(program: ExportedProgram) -> None:
    """The counter counts before it is read."""
    before, after = calls(program, "clone")[0], calls(program, "add_.")[0]
    after.append(before)


def wider(program: ExportedProgram) -> None:
    symbol = next(iter(program.range_constraints))
    program.range_constraints[symbol] = ValueRanges(0, 4096)


def presents(program: ExportedProgram) -> None:
    for node in calls(program, "getitem"):
        if "attention" in node.args[0].name and node.args[1]:
            node.args = (node.args[0], 3 - node.args[1])


def clamp(program: ExportedProgram) -> None:
    node = calls(program, "clamp")[0]
    node.args = (node.args[0], *(2 * a if isinstance(a, (int, float)) else a for a in node.args[1:]))


def targets(program: ExportedProgram) -> None:
    """What is written to one buffer is said to be written to the other."""
    one, two = [s for s in program.graph_signature.output_specs if "MUTATION" in s.kind.name]
    one.target, two.target = two.target, one.target


TAMPERED: dict[str, tuple[str, Callable[[ExportedProgram], None], list[str]]] = {
    "another epsilon": ("llama", give("rms_norm", epsilon=1e-6), ["rms_norm_3", "is 1e-06", "1e-05", "rms_norm.py"]),
    "an epsilon a little off": ("llama", give("rms_norm", 2, epsilon=1.0000001e-5), ["rms_norm_5", "epsilon"]),
    "another axis": ("llama", give("rms_norm", axis=1), ["axis is 1, proven is -1"]),
    "another scale": ("llama", give("attention", scale=0.5), ["attention", "scale is 0.5", "attention.py"]),
    "soft-cap": ("llama", give("attention", softcap=30.0), ["softcap is 30.0"]),
    "more heads": ("llama", give("attention", kv_num_heads=4), ["kv_num_heads is 4, proven is 2"]),
    "heads of a rotation": ("llama", give("rotary_embedding", num_heads=2), ["num_heads is 2, proven is 4", "rotary"]),
    "halves for neighbours": ("llama", give("rotary_embedding", interleaved=0), ["interleaved is 0, proven is 1"]),
    "cos for sin": ("llama", swap("rotary_embedding", 1, 2), ["cos_cache is expand_3", "sin_cache is expand_2"]),
    "not causal": ("llama", give("attention", is_causal=0), ["is_causal is 0, proven is 1"]),
    "v for k": ("llama", swap("attention", 1, 2), ["K is linear_2", "V is rotary"]),
    "another weight": ("llama", argument("rms_norm", 1, "p_norm_scale"), ["is p_norm_scale", "p_layers_0_sa_norm"]),
    "a norm is missing": ("llama", delete("rms_norm"), ["to_1", "self is to, proven is rms_norm_3", "rms_norm.py"]),
    "another value": ("llama", insert(aten.neg.default, "silu"), ["aten::neg", "neg"]),
    "a value that nobody reads": ("llama", insert(aten.neg.default, "silu", read=False), ["aten::neg", "not part of"]),
    "another function": ("llama", lambda p: setattr(calls(p, "silu")[0], "target", aten.relu.default), ["silu"]),
    "a weight's last bit": ("llama", state("norm.scale"), ["parameter norm.scale", "at [1]"]),
    "a table": ("llama", constant, ["buffer layers.0.attn.pos_embeddings"]),
    "a length": ("llama", wider, ["range of size", "4096"]),
    "causal for a window": ("a window", give("attention", is_causal=1), ["is_causal is 1, proven is 0", "programs_to"]),
    "no window": ("a window", argument("attention", 3, None), ["attn_mask is absent", "attention"]),
    "outputs the other way round": ("a window", outputs, ["output 0", "original gives rms_norm"]),
    "a bit of a mask": ("a mask in a buffer", state("mask"), ["buffer mask", "at [0, 1] it is True"]),
    "no mask": ("a mask that is an input", argument("attention", 3, None), ["attn_mask is absent, proven is mask"]),
    "another mask": ("a mask that is an input", argument("attention", 3, "other"), ["is other, proven is mask"]),
    "values for keys of the past": ("growing cache", swap("attention_with", 4, 5), ["past_key is past_v, proven"]),
    "values for keys of the present": (
        "growing cache",
        presents,
        ["output 1", "concat"],
    ),
    "no past": ("growing cache", argument("attention_with", 4, None), ["past_key is absent, proven is past_k"]),
    "a write elsewhere": ("static cache, functional", give("tensor_scatter", axis=3), ["axis is 3, proven is 2"]),
    "around the end": ("static cache, functional", give("tensor_scatter", mode="circular"), ["mode is circular"]),
    "another buffer": ("static cache, functional", targets, ["output 0", "buffer mutation of v"]),
    "another order of writes": ("writes", written_earlier, ["node clone", "before = self.count.clone()"]),
    "no write": ("writes", unwritten, ["reads or writes what has changed"]),
    "a write too many": ("writes", insert(aten.mul_.Tensor, "rms_norm"), ["mul_"]),
    "all documents": ("flex, documents", argument("attention", 3, None), ["attn_mask is absent"]),
    "not only the past": ("flex, causal", give("attention", is_causal=0), ["is_causal is 0, proven is 1"]),
    "another bound": ("flex, primitives", clamp, ["clamp"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_refused_by_name(case: str) -> None:
    name, tamper, words = TAMPERED[case]
    changed = copy_program(fused(name))
    tamper(changed)
    with pytest.raises(fxfuse.ParityError) as caught:
        fxfuse.verify(original(name), changed)
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_an_unproven_fusion_is_refused() -> None:
    """A pattern whose replacement is wrong, fused with `prove="off"`."""
    wrong, program = tanh_gelu("none")
    done = fxfuse.fuse(program, patterns=[wrong], prove="off")
    assert len(fxfuse.report(done).fused()) == 1
    with pytest.raises(fxfuse.ParityError, match="aten::gelu"):
        fxfuse.verify(program, done, patterns=[wrong])


class Copied(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = x.transpose(0, 1).reshape(-1)
        two = x.transpose(0, 1).reshape(-1)
        one[0] = 5.0
        return one + one.mean() if x.dim() == 2 else two


def test_equal_values_are_not_one_storage() -> None:
    """A copy that was written to is not the copy that was not."""
    program = torch.export.export(Copied(), (torch.randn(3, 4),))
    changed = copy_program(program)
    one, two = calls(changed, "reshape")
    (mean,), (add,) = calls(changed, "mean"), calls(changed, "add")
    assert fxfuse.verify(program, copy_program(program)).kept
    mean.replace_input_with(one, two)
    add.replace_input_with(one, two)
    x = torch.randn(3, 4)
    assert not torch.equal(program.module()(x), changed.module()(x))
    with pytest.raises(fxfuse.ParityError):
        fxfuse.verify(program, changed)
    two.replace_all_uses_with(one)
    changed.graph.erase_node(two)
    assert torch.equal(program.module()(x), changed.module()(x))


@pytest.mark.parametrize("other", ["clone", "reshape"])
def test_what_is_written_to_is_told_by_more_than_its_value(other: str) -> None:
    """The program writes to the first copy and reads it; the other writes to one and reads another."""

    class Once(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            copy = x.transpose(0, 1).reshape(-1) if other == "reshape" else x.clone()
            copy.view(-1)[0] = 5.0
            return copy * 2

    program = torch.export.export(Once(), (torch.randn(3, 4),))
    changed = copy_program(program)
    (copy,) = calls(changed, other)
    with changed.graph.inserting_after(copy):
        again = changed.graph.node_copy(copy)
    (product,) = calls(changed, "mul")
    product.replace_input_with(copy, again)
    with pytest.raises(fxfuse.ParityError):
        fxfuse.verify(program, changed)


def test_another_model_of_the_same_shapes_is_refused() -> None:
    with pytest.raises(fxfuse.ParityError):
        fxfuse.verify(original("llama"), fused("a window"))
    model = Block(False).eval()
    model.norm.eps = 1e-4
    other = torch.export.export(model, (torch.randn(2, 9, 32), torch.arange(9.0)))
    with pytest.raises(fxfuse.ParityError):
        fxfuse.verify(original("a window"), fxfuse.fuse(other))
