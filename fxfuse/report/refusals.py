"""Names of refusals: short, the same in every run of the same model file, and what `fuse(accept=…)` takes."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches

from torch.fx import GraphModule, Node

from fxfuse.errors import FxfuseWarning, callers_level
from fxfuse.graph.source import place_of
from fxfuse.proof.accepted import BOUNDS, break_name
from fxfuse.recognise.answers import Pattern
from fxfuse.report.model import Entry, Report

_PLACED = re.compile(r"\(([\w.]+@[^()\n]+:\d+)\)")
_BARE = re.compile(r"\(([a-z_]\w*)\)$")
"""The name of a step in a user's example, which has no line in the model."""


def name_of(operator: str, reason: str, anchor: Node | None) -> str | None:
    """A name for a refusal: that of the call that the reason blames; else the operator with the model's line."""
    found = _PLACED.search(reason) or _BARE.search(reason)
    if found is not None:
        return found[1]
    if anchor is None:
        return None
    place = place_of(anchor)
    return f"{operator.lower()}@{place}" if place else operator.lower()


def names_in(module: GraphModule) -> Iterator[str]:
    """The names that refusals could have in a program: one for each call, those in its subgraphs included."""
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            yield from (break_name(node) for node in inner.graph.nodes if node.op == "call_function")


def settle(report: Report, accept: Collection[str], module: GraphModule) -> None:
    """Tell the caller what became of the names in `accept`.

    An entry whose refusal could not be overruled says so in the report. For a name under which nothing was refused a
    warning is given.
    """
    overruled = {name for entry in report for name in (entry.evidence.accepted if entry.evidence else ())}
    refused = {entry.name for entry in report if entry.status != "fused"}
    calls = set(names_in(module)) if accept else set()
    for name in accept:
        if name in refused:
            report.entries[:] = [_not_overruled(entry, name) for entry in report]
        elif name not in overruled:
            what = "nothing was refused by it" if name in calls else "nothing in this program has that name"
            near = get_close_matches(name, sorted({n for n in refused if n}), n=2)
            hint = f"; the report has {' and '.join(near)}" if near else ""
            warnings.warn(f"accept={name!r} changed nothing: {what}{hint}", FxfuseWarning, stacklevel=callers_level())


def _not_overruled(entry: Entry, name: str) -> Entry:
    if entry.status == "fused" or entry.name != name:
        return entry
    what = name.partition("@")[0]
    if what in BOUNDS:
        why = "the two differ within its bounds too"
    elif what == entry.operator.lower():
        why = "it is no bound and no fill, but what is computed is something else"
    else:
        why = f"{what} is not the identity between two bounds, nor does it fill with one number"
    return replace(entry, reason=f"{entry.reason}; accepting {name} does not overrule this: {why}")


def failed(pattern: Pattern, what: str, error: Exception) -> str:
    """``"the pattern geglu could not be asked: TypeError: no such thing (mine.py:12)"``"""
    return f"the pattern {pattern.name} {what}: {said(error)}"


def said(error: Exception) -> str:
    """``"TypeError: no such thing (mine.py:12)"``: an error with the last line of the traceback that is neither
    fxfuse's nor torch's."""
    where = ""
    with suppress(Exception):  # some exceptions cannot be printed
        text = str(error).strip()
        for frame in traceback.extract_tb(error.__traceback__):
            if not any(f"{os.sep}{own}{os.sep}" in frame.filename for own in ("fxfuse", "torch")):
                where = f" ({os.path.basename(frame.filename)}:{frame.lineno})"
        return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
    return type(error).__name__
