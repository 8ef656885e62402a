"""``fxfuse export DIR``: a language model of transformers, with its cache, as a folder that generates text."""

from __future__ import annotations

import argparse
import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fxfuse
from fxfuse.cli import source, tables
from fxfuse.cli.progress import Stages
from fxfuse.cli.quantize import check_quantize, quantized
from fxfuse.cli.reports import REPORT, report_files, run_record
from fxfuse.decoder.options import check_decoder_options
from fxfuse.errors import FxfuseError
from fxfuse.ops.opsets import check_opset
from fxfuse.options import check_accept, check_budget
from fxfuse.package.genai import check_form
from fxfuse.parity.eager import Check
from fxfuse.pretrained import Holds, check_dtype, dtype_for_cpu, load
from fxfuse.pretrained.dtypes import CPU_DTYPES, FOR_A_CPU, NO_BFLOAT16
from fxfuse.recognise.catalogue import catalogue
from fxfuse.recognise.declared import keywords
from fxfuse.report.record import dumps


def generates(arguments: argparse.Namespace, holds: Holds | None) -> bool:
    """Is a graph with a cache asked for? `holds` is what SOURCE holds, if it is a folder."""
    asked = arguments.cache or arguments.package or arguments.pair or arguments.names
    return holds.generates if holds is not None else bool(asked and arguments.source.startswith("torchtune:"))


def check_options(arguments: argparse.Namespace, holds: Holds | None) -> None:
    """Refuse options that apply only to other kinds of sources.

    Raises:
        FxfuseError: an option that has no meaning for this SOURCE.
    """
    if arguments.names == "hf" and arguments.package == "genai":
        raise FxfuseError("onnxruntime-genai has names of its own", where="--names hf", hint="--names genai")
    check_dtype(source.parse_dtype(arguments.dtype), arguments.package)
    check_quantize(arguments)
    if arguments.allow_missing and holds is None:
        raise FxfuseError("--allow-missing is for a checkpoint's folder of transformers", where=arguments.source)
    if holds is not None:
        given = {"--set": arguments.options, "--checkpoint": arguments.checkpoint}
        for option, value in given.items():
            if value:
                raise FxfuseError(f"{option} does not apply to a checkpoint's folder", where=arguments.source)
    if generates(arguments, holds):
        for keyword, one in keywords(catalogue()).items():
            if arguments.of_patterns.get(keyword, one.default) != one.default:
                raise FxfuseError(f"{one.flag} does not apply to a graph with a cache", where=arguments.source)
        check_opset(arguments.opset)
        check_accept(arguments.accept)
        check_budget(arguments.budget)
        if arguments.package == "genai":
            check_form(arguments.cache or "auto")
        check_decoder_options(one_token=arguments.pair, **_choices(arguments))
        for option, value in (("--batch", arguments.batch), ("--seq", arguments.seq)):
            if value:
                raise FxfuseError(f"{option} does not apply to a graph with a cache", where=arguments.source)
        return
    asked = {
        "--package": arguments.package,
        "--pair": arguments.pair or None,
        "--cache": arguments.cache,
        "--names": arguments.names,
        "--sinks": arguments.sinks,
        "--window": arguments.window,
    }
    for option, value in asked.items():
        if value is not None:
            if holds is not None:
                raise FxfuseError(
                    f"{option} is for a model that generates text: {holds.cls.__name__} keeps no cache",
                    where=arguments.source,
                    hint=f"leave {option} out; it is exported as it is",
                )
            raise FxfuseError(
                f"{option} is for a model that generates text",
                where=arguments.source,
                hint="name a checkpoint's folder (config.json and its weights) or torchtune:BUILDER",
            )


def export_generation(arguments: argparse.Namespace, holds: Holds | None, out: Console, err: Console) -> None:
    """Load the model, export it with its cache, compare a prompt and the steps after it, and write the package.

    Raises:
        FxfuseError: bad input. The folder holds what it held before.
        ParityError: the graphs compute something else. Nothing is written then.
    """
    dtype = source.parse_dtype(arguments.dtype)
    target: Path = arguments.out
    if target.exists() and not target.is_dir():
        raise FxfuseError("the output folder is a file", where=str(target))
    stages = Stages(err)
    with report_files(arguments.report) as write_reports:
        with stages.stage("load"):
            model, about, notes = load_model(arguments, holds, dtype)
            notes = [*notes, *quantized(model, arguments)]
        # Imported here, because they import transformers, which may not be installed.
        from fxfuse.decoder.export import export_decoder, export_step
        from fxfuse.integrations.torchtune import Eager, is_decoder
        from fxfuse.package.write import write_package
        from fxfuse.runtime.check import check_package
        from fxfuse.runtime.eager import EagerSession

        with stages.stage("export"):
            options = _choices(arguments) | _fusing(arguments)
            prefill = export_decoder(model, **options)
            decode = export_step(model, **options) if arguments.pair else None
        report = fxfuse.report(decode or prefill)
        checks: list[Check] = []
        unrunnable = next(model.parameters()).dtype not in CPU_DTYPES

        def check(folder: Path) -> None:
            gc.collect()

            def eager(module: Any) -> EagerSession:
                return EagerSession(Eager(module) if is_decoder(module) else module)

            rounded = next(model.parameters()).dtype != torch.float32
            wide = eager(copy.deepcopy(model).double()) if rounded and arguments.quantize is None else None
            with stages.stage("onnxruntime"):
                results = check_package(folder, eager(model), wide)
            names = ["prompt", *(f"step {step}" for step in range(1, len(results)))]
            backend = "ONNX Runtime (f32)" if unrunnable else "ONNX Runtime"
            checks.extend(Check(backend, n, n, result) for n, result in zip(names, results, strict=True))

        with stages.stage("write"):
            manifest = write_package(
                target,
                prefill,
                decode=decode,
                package=arguments.package or "fxfuse",
                model=about,
                tokenizer=Path(arguments.source) if holds is not None else arguments.checkpoint,
                check=check if arguments.parity else None,
            )
        sizes = {path.name: path.stat().st_size for path in target.iterdir() if path.suffix in (".onnx", ".data")}
        result = run_record(arguments, report, stages, checks, sizes)
        tables.show_report(out, report)
        if checks:
            tables.show_checks(out, checks)
        tables.show_costs(out, stages, {str(target / name): size for name, size in sizes.items()})
        cache = manifest.cache
        if checks and cache.form == "streaming":
            notes = [*notes, "compared while no token had dropped out: beyond that a stream is not the model's own"]
        for note in notes:
            out.print(f"note: {note}", markup=False, highlight=False)
        runs = NO_BFLOAT16 + FOR_A_CPU if unrunnable else f"fxfuse.runtime.Session({str(target)!r})"
        out.print(
            f"{len(cache.layers)} layers, a {cache.form} cache, {cache.dtype}: {runs}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        write_reports(report, result, checks)
        (target / REPORT).write_text(dumps(result), encoding="utf-8")


def _choices(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `export_decoder` that both graphs of a pair share."""
    return {
        "opset": arguments.opset,
        "cache": arguments.cache or "auto",
        "names": arguments.names or "genai",
        "sinks": arguments.sinks,
        "window": arguments.window,
    }


def _fusing(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `export_decoder` that are those of `fxfuse.fuse`."""
    return {"accept": arguments.accept, "budget": arguments.budget, "strict": arguments.strict}


def load_model(
    arguments: argparse.Namespace, holds: Holds | None, dtype: torch.dtype | None
) -> tuple[Any, dict[str, Any], list[str]]:
    """The model, the facts about it for the manifest, and notes for the user."""
    if holds is not None:
        from fxfuse.package.write import facts

        chosen, note = dtype_for_cpu(holds.config, dtype)
        model, notes = load(holds, chosen, allow_missing=arguments.allow_missing)
        return model, facts(model.config), [*notes, *([note] if note else [])]
    options = source.parse_options(arguments.options)
    loaded = source.load(source.Request(arguments.source, dtype, options, arguments.checkpoint))
    tune: Any = loaded.model
    from fxfuse.integrations.torchtune import is_decoder

    if not is_decoder(tune):
        raise FxfuseError(
            f"{type(tune).__name__} is no decoder, and has no cache",
            where=arguments.source,
            hint="without --cache, --package and --pair it is exported as it is",
        )
    heads = getattr(getattr(tune.layers[0], "attn", None), "num_heads", None)
    about = {
        "context_length": getattr(tune, "max_seq_len", None),
        "hidden_size": tune.tok_embeddings.embedding_dim,
        "heads": heads,
        **special_tokens(arguments.checkpoint),
    }
    return tune, about, loaded.notes


def special_tokens(checkpoint: Path | None) -> dict[str, Any]:
    """Special tokens from the checkpoint's config.json, if there is one; a torchtune model does not know them."""
    file = checkpoint / "config.json" if checkpoint is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        ids = {name: config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")}
    except (ValueError, AttributeError) as error:
        raise FxfuseError(f"not a configuration: {error}", where=str(file)) from error
    eos = ids["eos"]
    return {**ids, "eos": eos if isinstance(eos, list) else [] if eos is None else [eos]}
