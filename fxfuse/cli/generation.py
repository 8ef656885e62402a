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
from fxfuse.cli.reports import REPORT, report_files, run_record
from fxfuse.cli.verify import Check
from fxfuse.errors import FxfuseError
from fxfuse.onnx.choices import check_choices
from fxfuse.onnx.genai import check_form
from fxfuse.ops.registry import check_opset
from fxfuse.options import check_accept, check_budget
from fxfuse.report.record import dumps


def is_pretrained(name: str) -> bool:
    """Whether SOURCE is the folder of a checkpoint as transformers writes it."""
    return (Path(name) / "config.json").is_file()


def generates(arguments: argparse.Namespace) -> bool:
    """Whether it is a graph with a cache that is asked for."""
    asked = arguments.cache or arguments.package or arguments.pair or arguments.names
    return is_pretrained(arguments.source) or bool(asked and arguments.source.startswith("torchtune:"))


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses what applies to the other kind of source.

    Raises:
        FxfuseError: an option that has no meaning for this SOURCE.
    """
    if arguments.names == "hf" and arguments.package == "genai":
        raise FxfuseError("onnxruntime-genai has names of its own", where="--names hf", hint="--names genai")
    if generates(arguments):
        flex = {"--flex-attention": arguments.flex_attention, "--windows": arguments.windows}
        for option, value in flex.items():
            if value not in ("standard", "mask"):
                raise FxfuseError(f"{option} does not apply to a graph with a cache", where=arguments.source)
        check_opset(arguments.opset)
        check_accept(arguments.accept)
        check_budget(arguments.budget)
        if arguments.package == "genai":
            check_form(arguments.cache or "auto")
        check_choices(one_token=arguments.pair, **_choices(arguments))
    if is_pretrained(arguments.source):
        given = {"--set": arguments.options, "--checkpoint": arguments.checkpoint}
        for option, value in {**given, "--batch": arguments.batch, "--seq": arguments.seq}.items():
            if value:
                raise FxfuseError(f"{option} does not apply to a checkpoint's folder", where=arguments.source)
        return
    if generates(arguments):
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
            raise FxfuseError(
                f"{option} is for a model that generates text",
                where=arguments.source,
                hint="name a checkpoint's folder (config.json and its weights) or torchtune:BUILDER",
            )


def export_generation(arguments: argparse.Namespace, out: Console, err: Console) -> None:
    """Loads, exports with its cache, compares a prompt and the steps after it, and writes the package.

    Raises:
        FxfuseError: bad input. What stood in the folder before still does.
        ParityError: the graphs compute something else. Nothing is written then.
    """
    dtype = source.parse_dtype(arguments.dtype)
    target: Path = arguments.out
    if target.exists() and not target.is_dir():
        raise FxfuseError("the output folder is a file", where=str(target))
    stages = Stages(err)
    with report_files(arguments.report) as write_reports:
        with stages.stage("load"):
            model, about, notes = load_model(arguments, dtype)
        # Late: they import transformers, which load_pretrained has found or missed.
        from fxfuse.onnx.decoder import export_decoder
        from fxfuse.onnx.package import write_package
        from fxfuse.onnx.step import export_step
        from fxfuse.onnx.torchtune import Eager, is_decoder
        from fxfuse.runtime.check import check_package
        from fxfuse.runtime.eager import EagerSession

        with stages.stage("export"):
            options = _choices(arguments) | _fusing(arguments)
            prefill = export_decoder(model, **options)
            decode = export_step(model, **options) if arguments.pair else None
        report = fxfuse.report(decode or prefill)
        checks: list[Check] = []

        def check(folder: Path) -> None:
            gc.collect()

            def eager(module: Any) -> EagerSession:
                return EagerSession(Eager(module) if is_decoder(module) else module)

            rounded = next(model.parameters()).dtype != torch.float32
            wide = eager(copy.deepcopy(model).double()) if rounded else None
            with stages.stage("onnxruntime"):
                results = check_package(folder, eager(model), wide)
            names = ["prompt", *(f"step {step}" for step in range(1, len(results)))]
            checks.extend(Check("ONNX Runtime", n, n, result) for n, result in zip(names, results, strict=True))

        with stages.stage("write"):
            manifest = write_package(
                target,
                prefill,
                decode=decode,
                package=arguments.package or "fxfuse",
                model=about,
                tokenizer=Path(arguments.source) if is_pretrained(arguments.source) else arguments.checkpoint,
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
        out.print(
            f"{len(cache.layers)} layers, a {cache.form} cache, {cache.dtype}: fxfuse.runtime.Session({str(target)!r})",
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
    return {"accept": arguments.accept, "budget": arguments.budget}


def load_model(arguments: argparse.Namespace, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any], list[str]]:
    """The model, what a manifest says of it, and what its user should know."""
    if is_pretrained(arguments.source):
        from fxfuse.onnx.package import facts

        model = load_pretrained(Path(arguments.source), dtype)
        return model, facts(model.config), []
    options = source.parse_options(arguments.options)
    loaded = source.load(source.Request(arguments.source, dtype, options, arguments.checkpoint))
    tune: Any = loaded.model
    from fxfuse.onnx.torchtune import is_decoder

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
    """What the checkpoint's config.json says of its tokens, if there is one: torchtune's models say nothing of them."""
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


def load_pretrained(folder: Path, dtype: torch.dtype | None) -> Any:
    """The causal language model in `folder`, in evaluation mode; `dtype` None is what the checkpoint is in.

    Raises:
        FxfuseError: transformers is not installed, or does not load it.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise FxfuseError("transformers is not installed", hint="pip install 'fxfuse[transformers]'") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    except Exception as error:  # a broken checkpoint raises what its reader raises
        raise FxfuseError(f"the model cannot be loaded: {error}", where=str(folder)) from error
    return model.eval().requires_grad_(False)
