"""``torch.onnx.export``, with the graph fused before anything retraces or decomposes it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

import fxfuse
from fxfuse.errors import FxfuseError
from fxfuse.files import save
from fxfuse.fusion import REPORT, fuse_with
from fxfuse.graph.higher_order import higher_order
from fxfuse.graph.program import without_guards
from fxfuse.graph.source import source_line
from fxfuse.onnx.active import within
from fxfuse.onnx.capturing.capture import META, capture, check_inputs, check_program
from fxfuse.onnx.check import check_export, check_weights
from fxfuse.onnx.functions import add_functions, function_calls
from fxfuse.onnx.state_names import name_states
from fxfuse.onnx.translate.axes import axis_names, without_numbers
from fxfuse.onnx.translate.bfloat16 import without_bfloat16_gaps
from fxfuse.onnx.translate.boolean import without_boolean_where
from fxfuse.onnx.translate.lowest import without_lowest
from fxfuse.onnx.translate.missing import missing_translations
from fxfuse.onnx.translate.packed import pack_integers
from fxfuse.onnx.translate.products import arrange_quantised_weights
from fxfuse.onnx.translate.ready import check_no_complex, ready
from fxfuse.onnx.translate.takes import check_taken
from fxfuse.onnx.translate.untranslated import one_message
from fxfuse.onnx.widened import warn_of_widened
from fxfuse.ops import holds_fused, translation_table
from fxfuse.ops.opsets import check_opset
from fxfuse.ops.registry import JOINS
from fxfuse.options import Options
from fxfuse.parity import require_onnxruntime
from fxfuse.prepass import options_of
from fxfuse.quiet import quiet
from fxfuse.recognise.answers import Pattern
from fxfuse.state.lift import Lifted, lift
from fxfuse.state.mutations import mutations
from fxfuse.torch_seams import one_at_a_time


def export(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
    opset_version: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    external_data: bool = True,
    prove: Literal["on", "off"] | None = None,
    patterns: Sequence[Pattern] | None = None,
    frozen: bool | None = None,
    accept: Sequence[str] | None = None,
    budget: float | None = None,
    check: bool = False,
    strict: bool | None = None,
    custom_translation_table: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    export_params: bool = True,
    keep_initializers_as_inputs: bool = False,
    optimize: bool = True,
    verify: bool = False,
    verbose: bool | None = False,
    report: bool = False,
    profile: bool = False,
    dump_exported_program: bool = False,
    artifacts_dir: str | os.PathLike[str] = ".",
    dynamo: bool = True,
    **of_patterns: Any,
) -> torch.onnx.ONNXProgram:
    """Export `model` to ONNX with what the patterns recognise as single standard operators.

    Takes what ``torch.onnx.export(..., dynamo=True)`` takes, with the same meaning; what differs is listed here.

    Args:
        model: a module, or a program from ``torch.export.export``, which may be fused already. It is not changed. A
            module in training mode is exported, after a warning, if it computes the same as in evaluation mode.
        args: sample inputs, nested as the module takes them; unused for a program. Numbers, texts and None are
            constants of the graph, but for whole numbers that `dynamic_shapes` asks to be dynamic.
        f: the file to write, whole or not at all. None writes nothing.
        kwargs: sample inputs by name; unused for a program.
        dynamic_shapes: which dimensions vary, as for ``torch.export.export``; strings and `Dim` name them in the ONNX
            graph. One that stays fixed is an error, and for ``Dim.AUTO`` a warning: it names the guard and the model's
            line (`fxfuse.onnx.capturing.capture`). For a program only the names are used.
        opset_version: 23, 24 or 25; None means what `fxfuse.prepass` marked the module with, or else 24. ONNX
            Runtime's CPU kernels of Attention end at 24.
        external_data: the weights go to ``f + ".data"``. A model over 2 GB has no other way.
        prove: "off" applies matches that were recognised but not proven; None means what the module was marked
            with, or else "on".
        patterns: the patterns to look for; None means what the module was marked with, or else all registered ones.
        frozen: do persistent buffers keep what they hold? None means what the module was marked with, or else yes: the
            file holds their values.
        accept: refusals to overrule, by the names that the report gives them, see `fxfuse.fuse`; None means those that
            the module was marked with.
        budget: seconds after which the search for more to fuse ends; None means what the module was marked with, or
            else 60.
        check: run the result in ONNX Runtime and compare it with eager PyTorch, at the sample, at batch 1 and at
            another batch and length where `dynamic_shapes` lets them vary (needs the `ort` extra). By default nothing
            is compared: fusions are proven, but torch's translation of everything else is not looked at.
        strict: is nothing fused that differs on the smallest rows, see `fxfuse.fuse`; None means what the module was
            marked with, or else no.
        custom_translation_table: translations beside fxfuse's own; on the same operator these win.
        verify: torch.onnx's own check of the written graph in ONNX Runtime (needs the `ort` extra). It has nothing to
            do with `fxfuse.verify`.
        **of_patterns: options of single patterns, see `fxfuse.fuse`; those that are not given are what the module was
            marked with.

    What the model writes to in place becomes inputs and outputs, behind all others: `fxfuse.onnx.state_names` says how
    they are named.

    Returns:
        The ONNX program. `fxfuse.report` of it says what was fused, and what was not and why.

    Raises:
        FxfuseError: bad input; the message says what and where. Nothing is written then.
        ParityError: with `check`, ONNX Runtime does not give what eager PyTorch does; the message holds the largest
            difference. Nothing is written then.
    """
    if not dynamo:
        raise FxfuseError("fxfuse fuses captured programs; there are none with dynamo=False", where="dynamo")
    if isinstance(f, io.IOBase):
        raise FxfuseError(
            "f must be a path, not an open file", where="f", hint="or f=None, then .save() or .model_proto"
        )
    marked = options_of(model) or Options()
    options = marked.but(
        prove=prove, patterns=patterns, frozen=frozen, accept=accept, budget=budget, strict=strict, **of_patterns
    )
    opset = as_opset(marked.opset if opset_version is None else opset_version)
    if check:
        require_onnxruntime()
        check_weights(model)
    lifted = lifted_program(model, args, kwargs, dynamic_shapes)
    program = lifted.program
    check_values(program)
    fused = program if holds_fused(program) else fuse_with(program, options.for_export(opset))
    check_no_higher_order(fused)
    onnx_program = translate(
        fused,
        opset=opset,
        dynamic_shapes=names_of(model, args, kwargs, dynamic_shapes, lifted),
        input_names=input_names,
        output_names=output_names,
        custom_translation_table=custom_translation_table,
        optimize=optimize,
        verify=verify,
        verbose=verbose,
        report=report,
        profile=profile,
        dump_exported_program=dump_exported_program,
        artifacts_dir=artifacts_dir,
    )
    name_states(onnx_program.model, fused, lifted.states)
    if check:
        check_export(onnx_program, model, lifted, args, kwargs)
    if f is not None:
        save(
            onnx_program,
            f,
            external_data=external_data,
            include_initializers=export_params,
            keep_initializers_as_inputs=keep_initializers_as_inputs,
        )
    return onnx_program


def lifted_program(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
) -> Lifted:
    """`model` captured as in `as_program`, with the state that it writes in place as inputs and outputs.

    State that is not a buffer of the model (the tensors of transformers' `StaticCache`) would be captured as constants
    without a name, which cannot be lifted. Such models are captured by Dynamo (`strict`), which gives them names.

    Raises:
        FxfuseError: what `as_program` refuses, or a write that cannot be lifted.
    """
    program = as_program(model, args, kwargs, dynamic_shapes)
    try:
        return lift(program)
    except FxfuseError:
        # Dynamo would lose a buffer that is assigned anew (self.cache = …), so it is not the first choice.
        named_only = all(m.kind is not InputKind.CONSTANT_TENSOR for m in mutations(program))
        if named_only or not isinstance(model, torch.nn.Module):
            raise
        try:
            with quiet():
                program = capture(model, args, kwargs, dynamic_shapes, strict=True)
            return lift(program)
        except FxfuseError:
            pass
        raise


def names_of(model: object, args: Any, kwargs: Any, dynamic_shapes: Any, lifted: Lifted) -> Any:
    """`dynamic_shapes` in the form from which `translate` takes the names of dimensions."""
    if isinstance(model, torch.nn.Module):
        return axis_names(model, check_inputs(args, kwargs), dynamic_shapes, lifted.program)
    return None if lifted.states else axis_names(model, ((), {}), dynamic_shapes, lifted.program)


def check_values(program: ExportedProgram) -> None:
    """Refuse weights without values, because an ONNX file has to hold the values.

    Raises:
        FxfuseError: one of them is on the meta device.
    """
    held: dict[str, Any] = {**program.state_dict, **program.constants}
    empty = [name for name, value in held.items() if isinstance(value, torch.Tensor) and value.is_meta]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise FxfuseError("weights on the meta device hold no values", where=f"{empty[0]}{more}", hint=META)


def as_program(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
) -> ExportedProgram:
    """`model` as a captured program whose inputs ONNX can have.

    Raises:
        FxfuseError: `model` is neither a module nor a program, or its inputs are bad.
    """
    if isinstance(model, ExportedProgram):
        check_program(model)
        return model
    if isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        with quiet():
            return capture(model, args, kwargs, dynamic_shapes)
    raise FxfuseError(
        f"expected a torch.nn.Module or a torch.export.ExportedProgram, got {type(model).__qualname__}",
        where="model",
        hint="capture it with torch.export.export(module, args)",
    )


def translate(
    fused: ExportedProgram,
    *,
    opset: int,
    custom_translation_table: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """The ONNX program of one that was lifted and fused (`lifted_program`, `fxfuse.fuse`).

    The program has to be lifted, because torch drops what a program writes in place. `options` go to
    ``torch.onnx.export``.

    Raises:
        FxfuseError: torch.onnx has no translation of a node, or its own one fails.
    """
    program = ready(fused)
    table: dict[Any, Any] = {
        **missing_translations(program.graph.nodes),
        **translation_table(opset),
        **({} if options.get("verify") else function_calls(opset)),  # torch verifies before the functions are there
        **(custom_translation_table or {}),
    }
    # The program is fused already: if the plugin is installed, it must not touch this export.
    with one_at_a_time(), within(None), quiet(), one_message():
        try:
            onnx_program = torch.onnx.export(
                without_guards(program),
                opset_version=opset,
                dynamo=True,
                custom_translation_table=table,
                **options,
            )
        except torch.onnx.OnnxExporterError as error:
            check_no_complex(program, error)
            raise
    assert onnx_program is not None  # only the TorchScript exporter returns None
    finish(onnx_program, program)
    add_functions(onnx_program.model)
    return onnx_program


def finish(onnx_program: torch.onnx.ONNXProgram, fused: ExportedProgram) -> None:
    """Finish what torch translated: join operators of several nodes, rewrite masks for ONNX Runtime, pack integers
    of four bits, attach the report for `fxfuse.report`."""
    check_taken(onnx_program.model)
    warn_of_widened(fused)
    for join in JOINS:
        join(onnx_program.model)
    without_numbers(onnx_program.model)
    without_boolean_where(onnx_program.model)
    without_bfloat16_gaps(onnx_program.model)
    without_lowest(onnx_program.model)
    pack_integers(onnx_program.model)
    arrange_quantised_weights(onnx_program.model)
    with suppress(FxfuseError):  # a program that was fused in another process has no report
        onnx_program.fxfuse_report = fxfuse.report(fused)  # type: ignore[attr-defined]
        onnx_program.model.meta[REPORT] = fxfuse.report(fused)


def check_no_higher_order(fused: ExportedProgram, translated: Callable[[Any], Any] | None = None) -> None:
    """ONNX has no operator for a call of flex_attention, or another operator that takes functions, that fusing left.

    Args:
        translated: says of an operator whether somebody else has a translation for it.

    Raises:
        FxfuseError: there is one; the message is the report's reason.
    """
    for node in fused.graph.nodes:
        if higher_order(node) is not None and not (translated is not None and translated(node.target)):
            entries: list[Any] = []
            with suppress(FxfuseError):  # a program that was fused in another process has no report
                entries = [e for e in fxfuse.report(fused) if e.reason is not None and node.name in e.nodes]
                entries += [e for e in fxfuse.report(fused) if not e.nodes and e.reason is not None]  # why it ended
            why = entries[0].reason if entries else "no pattern looked at it"
            where = ", ".join(filter(None, (node.name, source_line(node))))
            raise FxfuseError(f"{node.target} cannot be exported: {why}", where=where)


def as_opset(opset: int | None) -> int:
    """`opset` if fused operators can be written at it; None is 24.

    Raises:
        FxfuseError: it is outside 23 to 25, or no number.
    """
    if opset is None:
        return 24
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise FxfuseError(f"an opset is a whole number, not {opset!r}", where="opset_version")
    check_opset(opset)
    return opset
