"""What SOURCE names: a torchtune builder, a saved program, or a factory function."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxfuse.cli.checkpoint import load_checkpoint
from fxfuse.cli.torchtune import build, sample
from fxfuse.errors import FxfuseError
from fxfuse.pretrained import dtype_for_cpu, look, sample_of
from fxfuse.pretrained import load as load_pretrained
from fxfuse.pretrained.beside import left_out
from fxfuse.pretrained.holds import is_pretrained
from fxfuse.torch_seams import pytree

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What the command line asks for, before anything is loaded."""

    source: str
    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    batch: int | None = None
    seq: int | None = None
    allow_missing: bool = False


@dataclass
class Loaded:
    """A model with everything that capturing it needs, or a program that is captured already."""

    model: torch.nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    notes: list[str] = field(default_factory=list)
    """Notes for the user, such as that the weights are random."""
    folder: Path | None = None
    """The checkpoint's folder, where its configuration and tokenizer lie."""


def load(request: Request) -> Loaded:
    """Load what `request` names.

    Raises:
        FxfuseError: there is no such source, it cannot be loaded, or an option does not apply to it.
    """
    kind, _, name = request.source.partition(":")
    if kind == "torchtune" and not request.allow_missing:
        return _torchtune(name, request)
    if is_pretrained(request.source):
        return _pretrained(request)
    if request.allow_missing:
        raise FxfuseError("--allow-missing is for a checkpoint's folder of transformers", where=request.source)
    if request.batch is not None or request.seq is not None:
        raise FxfuseError("--batch and --seq are for models of torchtune and transformers", where=request.source)
    if request.source.endswith(".pt2") or (not name and Path(request.source).exists()):
        return _saved(Path(request.source), request)
    if name:
        return _factory(kind, name, request)
    raise FxfuseError(
        "no such source",
        where=request.source,
        hint="torchtune:BUILDER, a checkpoint's folder, a .pt2 file, or package.module:function",
    )


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None stays None."""
    if name is not None and name not in DTYPES:
        raise FxfuseError(f"unknown dtype {name!r}", where="--dtype", hint=", ".join(DTYPES))
    return None if name is None else DTYPES[name]


def parse_options(settings: Sequence[str]) -> dict[str, Any]:
    """``["num_layers=2"]`` as ``{"num_layers": 2}``."""
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.isidentifier():
            raise FxfuseError("expected NAME=VALUE", where=f"--set {setting}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise FxfuseError(
                f"{value!r} is not a Python literal",
                where=f"--set {setting}",
                hint=f"quote strings twice: --set \"{name}='{value}'\"",
            ) from error
    return options


def _torchtune(name: str, request: Request) -> Loaded:
    model, family = build(name, request.options, request.dtype or torch.float32, blank=request.checkpoint is not None)
    args, dynamic_shapes = sample(model, request.batch, request.seq)
    loaded = Loaded(model, args, {}, dynamic_shapes)
    if request.checkpoint is not None:
        load_checkpoint(model, request.checkpoint, family)
    else:
        loaded.notes.append("the weights are random: no --checkpoint was given")
    return loaded


def _pretrained(request: Request) -> Loaded:
    """An encoder of transformers. Decoders are exported with their cache, by `fxfuse.cli.generation`."""
    holds = look(request.source)
    if holds.generates:
        raise FxfuseError(
            f"{holds.cls.__name__} generates text, and is exported with its cache",
            where=request.source,
            hint="fxfuse export FOLDER --out DIR, whose report says what was fused",
        )
    for option, given in (("--set", request.options), ("--checkpoint", request.checkpoint)):
        if given:
            raise FxfuseError(f"{option} does not apply to a checkpoint's folder", where=request.source)
    dtype, note = dtype_for_cpu(holds.config, request.dtype)
    model, notes = load_pretrained(holds, dtype, allow_missing=request.allow_missing)
    # What its forward takes where it is not told otherwise: no cache, outputs with their names.
    model.config.use_cache, model.config.return_dict = False, True
    folder = Path(request.source)
    sample = sample_of(model, folder, request.batch, request.seq)
    notes += [*left_out(folder, allow_missing=request.allow_missing), *([note] if note else [])]
    return Loaded(model, (), dict(sample.kwargs), sample.dynamic_shapes, notes, folder)


def _saved(path: Path, request: Request) -> Loaded:
    for option, given in (("--dtype", request.dtype), ("--set", request.options), ("--checkpoint", request.checkpoint)):
        if given:
            raise FxfuseError(f"{option} does not apply to a saved program: it holds its own", where=str(path))
    return Loaded(saved_program(path))


def saved_program(path: Path) -> ExportedProgram:
    """The program in a file.

    Raises:
        FxfuseError: there is no such file, or torch.export.save did not write it.
    """
    if path.is_dir():
        raise FxfuseError(
            "the folder is no checkpoint of transformers: it has no config.json",
            where=str(path),
            hint="name the folder that holds it beside the weights; other weights go with --checkpoint",
        )
    if not path.is_file():
        raise FxfuseError("no such file", where=str(path))
    try:
        program: ExportedProgram = torch.export.load(path)
    except Exception as error:  # zipfile, json, pickle and torch each raise errors of their own on a file like that
        raise FxfuseError(
            f"not a program saved with torch.export.save: {type(error).__name__}: {_first_line(error)}",
            where=str(path),
        ) from error
    return program


def _factory(module: str, name: str, request: Request) -> Loaded:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except Exception as error:
        raise FxfuseError(
            f"cannot be imported: {type(error).__name__}: {_first_line(error)}",
            where=request.source,
            hint="modules are looked for in the current folder too",
        ) from error
    if not callable(factory):
        raise FxfuseError("not a function", where=request.source)
    try:
        made = factory(**request.options)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise FxfuseError(
            f"the factory raised {type(error).__name__}: {error}",
            where=f"{request.source} at {frame.filename}:{frame.lineno}",
        ) from error
    if not isinstance(made, tuple) or not 2 <= len(made) <= 4 or not isinstance(made[0], torch.nn.Module):
        raise FxfuseError(
            f"the factory returned {_describe(made)}",
            where=request.source,
            hint="return (model, args[, kwargs[, dynamic_shapes]]), the model a torch.nn.Module",
        )
    parts: list[Any] = [*made, None, None]
    model, args, kwargs, dynamic_shapes = parts[:4]
    args = (args,) if isinstance(args, torch.Tensor) else args
    if request.checkpoint is not None:
        load_checkpoint(model, request.checkpoint)
    if request.dtype is not None:
        model = model.to(request.dtype)
        args, kwargs = pytree.tree_map(
            lambda leaf: (
                leaf.to(request.dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
            ),
            (args, kwargs),
        )
    return Loaded(model, args, kwargs or {}, dynamic_shapes)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
