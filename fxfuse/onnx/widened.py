"""Warnings about tensors that the model keeps small (integers of few bits) and the exported graph reads wider."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace

import torch
from torch.export import ExportedProgram

import fxfuse
from fxfuse.errors import FxfuseError, FxfuseWarning, callers_level
from fxfuse.graph.source import module_path, source_line
from fxfuse.recognise.kept import Kept
from fxfuse.recognise.widened import Widened, widened
from fxfuse.report.model import Entry
from fxfuse.state.mutations import mutations


def warn_of_widened(fused: ExportedProgram) -> None:
    """Give an `FxfuseWarning` for each tensor that is larger in the file than in the model. It names the module, both
    sizes and the reason; the report has an entry for each as well."""
    kept = Kept(fused, frozen=False, written=frozenset(str(m.target) for m in mutations(fused)))
    entries: list[Entry] = []
    with suppress(FxfuseError):  # a program that was fused in another process has no report
        entries = fxfuse.report(fused).entries
    warned = set[str]()
    for found in widened(list(fused.graph.nodes), kept):
        at = next((i for i, e in enumerate(entries) if e.reason is not None and found.read.name in e.nodes), None)
        if at is None:
            at = len(entries)
            entries.append(_entry(found))
        said = entries[at]
        if found.sizes not in str(said.reason):
            said = entries[at] = replace(said, reason=f"{said.reason}: {found.sizes}")
        where = ", ".join(filter(None, (said.module, said.source, _target(fused, found))))
        text = f"a quantised tensor becomes large ({where}): {said.reason}"
        if text not in warned:  # a tensor inside of a subclass is taken out once for each call
            warnings.warn(text, FxfuseWarning, stacklevel=callers_level())
        warned.add(text)


def _entry(found: Widened) -> Entry:
    return Entry(
        operator="DequantizeLinear",
        status="near miss",
        nodes=(found.read.name,),
        reason="nothing was found that keeps it small",
        source=source_line(found.read),
        module=module_path(found.read),
    )


def _target(program: ExportedProgram, found: Widened) -> str | None:
    """The name of the parameter, buffer or constant that the tensor is."""
    leaf: torch.fx.Node = found.kept
    while leaf.op != "placeholder" and leaf.all_input_nodes:
        leaf = leaf.all_input_nodes[0]
    return next((str(s.target) for s in program.graph_signature.input_specs if s.arg.name == leaf.name), None)
