"""The commands: each takes the parsed arguments, a console for results and one for progress."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch.export import ExportedProgram

import fxfuse
from fxfuse.cli import source, tables
from fxfuse.cli.generation import check_options, export_generation, generates
from fxfuse.cli.progress import Stages, human, peak_memory
from fxfuse.cli.quantize import check_quantize, quantized
from fxfuse.cli.reports import REPORT, report_files, run_record
from fxfuse.cli.state import describe, record_of
from fxfuse.errors import FxfuseError, ParityError
from fxfuse.files import move_into, save, staging
from fxfuse.fusion import fuse_with
from fxfuse.onnx.exporter import lifted_program, names_of, translate
from fxfuse.onnx.state_names import name_states
from fxfuse.ops.opsets import check_opset
from fxfuse.options import Options
from fxfuse.parity import working_dtype
from fxfuse.parity.eager import Check, check_fused, check_model, expectations
from fxfuse.parity.original import original_outputs
from fxfuse.pretrained import look, output_names
from fxfuse.pretrained.dtypes import FOR_A_CPU, NO_BFLOAT16
from fxfuse.pretrained.files import copy_configuration, copy_tokenizer
from fxfuse.pretrained.holds import is_pretrained
from fxfuse.recognise.catalogue import catalogue
from fxfuse.report.record import dumps
from fxfuse.state.lift import Lifted

Command = Callable[[argparse.Namespace, Console, Console], None]

MODEL, DATA = "model.onnx", "model.onnx.data"


def export(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """Fuse, export, compare, and only then move the files into place.

    Raises:
        FxfuseError: bad input. The folder holds what it held before.
        ParityError: the exported model computes something else. The folder holds no model then.
    """
    holds = look(arguments.source) if is_pretrained(arguments.source) else None
    check_options(arguments, holds)
    if generates(arguments, holds):
        return export_generation(arguments, holds, out, err)
    options, request = fusing(arguments), request_of(arguments)
    target: Path = arguments.out
    if target.exists() and not target.is_dir():
        raise FxfuseError("the output folder is a file", where=str(target))
    stages = Stages(err)
    with staging(target.absolute().parent, target.name) as folder, report_files(arguments.report) as write_reports:
        loaded, lifted = load_program(request, stages, arguments)
        program = lifted.program
        with stages.stage("fuse"):
            fused = fuse_with(program, options)
        report = fxfuse.report(fused)

        expected, checks = [], list[Check]()
        if arguments.parity:
            with stages.stage("eager"):
                cases, eager = original_outputs(loaded.model, lifted)
            with stages.stage("reference"):
                expected = expectations(program, cases, eager)
            with stages.stage("fused"):
                checks += check_fused(fused, expected)
        with stages.stage("translate"):
            names = names_of(loaded.model, loaded.args, loaded.kwargs, loaded.dynamic_shapes, lifted)
            outputs = output_names(program) if loaded.folder is not None and not lifted.states else None
            onnx_program = translate(
                fused, opset=arguments.opset, dynamic_shapes=names, output_names=outputs or None, verbose=False
            )
            pairs = name_states(onnx_program.model, fused, lifted.states)
        with stages.stage("write"):
            save(onnx_program, folder / MODEL, external_data=True)
            if loaded.folder is not None:
                copy_tokenizer(loaded.folder, folder)
                copy_configuration(loaded.folder, folder)
        notes = [*loaded.notes, *describe(pairs)]
        if working_dtype(program) == torch.bfloat16:
            notes.append(NO_BFLOAT16 + ("" if isinstance(loaded.model, ExportedProgram) else FOR_A_CPU))
        # ONNX Runtime maps the written file below; weights that the model still holds would be in memory twice.
        del loaded, lifted, program, fused, onnx_program
        gc.collect()
        if arguments.parity:
            with stages.stage("onnxruntime"):
                checks += check_model(folder / MODEL, expected)

        sizes = {name: (folder / name).stat().st_size for name in (MODEL, DATA) if (folder / name).exists()}
        result = run_record(arguments, report, stages, checks, sizes, states=record_of(pairs))
        tables.show_report(out, report)
        if arguments.parity:
            tables.show_checks(out, checks)
        tables.show_costs(out, stages, {str(target / name): size for name, size in sizes.items()})
        for note in notes:
            out.print(f"note: {note}", markup=False, highlight=False)
        write_reports(report, result, checks)
        failed = [check for check in checks if not check.result.passed]
        if failed:
            for name in (MODEL, DATA, REPORT):
                (target / name).unlink(missing_ok=True)
            raise ParityError(
                f"the exported model does not compute what the original does: {failed[0].result.reason}",
                where=f"{failed[0].backend}, {failed[0].case} ({failed[0].sizes})",
                hint=f"{target} holds no model; `fxfuse inspect` shows what was fused",
            )
        (folder / REPORT).write_text(dumps(result), encoding="utf-8")
        target.mkdir(exist_ok=True)
        move_into(folder, target, model=MODEL)


def inspect(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """Fuse and report.

    Raises:
        FxfuseError: bad input.
    """
    check_quantize(arguments)
    options, request = fusing(arguments), request_of(arguments)
    stages = Stages(err)
    with report_files(arguments.report) as write_reports:
        _, lifted = load_program(request, stages, arguments)
        with stages.stage("fuse"):
            report = fxfuse.report(fuse_with(lifted.program, options))
        tables.show_report(out, report)
        out.print(
            f"{sum(stages.seconds.values()):.1f} s, of which fusing {stages.seconds['fuse']:.1f} s; "
            f"peak memory {human(peak_memory())}",
            highlight=False,
        )
        write_reports(report, run_record(arguments, report, stages, [], {}), [])


def repair(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """Mend an ONNX file.

    Raises:
        FxfuseError: bad input. The target is as it was before.
        ParityError: the mended file does not compute what the original does. It is not written.
    """
    from fxfuse.repair import repair

    stages = Stages(err)
    with stages.stage("repair"):
        done = repair(arguments.model, arguments.out, parity=arguments.parity)
    tables.show_repairs(out, done)


def patterns(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """List the catalogue."""
    tables.show_patterns(out, list(catalogue()))


def fusing(arguments: argparse.Namespace) -> Options:
    """How it is to be fused; what is written holds the values of the buffers, which are frozen for that.

    Raises:
        FxfuseError: an option is not what it should be.
    """
    return Options.given(
        opset=arguments.opset,
        frozen=True,
        accept=arguments.accept,
        budget=arguments.budget,
        strict=arguments.strict,
        **arguments.of_patterns,
    )


def request_of(arguments: argparse.Namespace) -> source.Request:
    """Everything that can be wrong with the arguments for the source alone, before any of the long work."""
    check_opset(arguments.opset)
    return source.Request(
        arguments.source,
        source.parse_dtype(arguments.dtype),
        source.parse_options(arguments.options),
        arguments.checkpoint,
        arguments.batch,
        arguments.seq,
        arguments.allow_missing,
    )


def load_program(
    request: source.Request, stages: Stages, arguments: argparse.Namespace | None = None
) -> tuple[source.Loaded, Lifted]:
    """The model that is asked for, and its capture, in which what it writes in place has become inputs and outputs.

    Its weights are quantised before that, if `arguments` ask for it.
    """
    with stages.stage("load"):
        loaded = source.load(request)
        if arguments is not None:
            loaded.notes += quantized(loaded.model, arguments)
    with stages.stage("capture"):
        lifted = lifted_program(loaded.model, loaded.args, loaded.kwargs, loaded.dynamic_shapes)
    return loaded, lifted
