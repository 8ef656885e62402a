"""Which patterns there are: the shipped catalogue, those of other packages, and those registered here."""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Sequence
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from fxfuse.errors import FxfuseWarning, callers_level
from fxfuse.ops.outside import enter, withdraw
from fxfuse.recognise.answers import Pattern, is_pattern

GROUP = "fxfuse.patterns"
_registered: list[Pattern] = []


def register(pattern: Pattern) -> None:
    """Add a pattern to the catalogue of this process.

    The same one again, from a cell of a notebook that was run twice, takes the place of the first. Another one of the
    same name does not: both are tried, the older first.
    """
    same = _defined(pattern)
    _take_out([p for p in _registered if p is pattern or _defined(p) == same])
    _registered.append(pattern)
    if (operator := getattr(pattern, "entry", None)) is not None:
        enter(operator)


def _defined(pattern: Pattern) -> tuple[str, str, str]:
    """Its name, and where the function that is its example, or else its class, is defined."""
    what = getattr(pattern, "function", type(pattern))
    return pattern.name, getattr(what, "__module__", ""), getattr(what, "__qualname__", repr(what))


def unregister(pattern: str | Pattern) -> None:
    """Take a registered pattern out again, or all of a name; and what was said of their operators: the translation to
    ONNX, and what `fxfuse.unfuse` writes them out as."""
    _take_out([p for p in _registered if p is pattern or p.name == pattern])


def _take_out(patterns: list[Pattern]) -> None:
    _registered[:] = [p for p in _registered if all(p is not gone for gone in patterns)]
    for pattern in patterns:
        if (operator := getattr(pattern, "entry", None)) is not None:
            withdraw(operator)


@cache
def _shipped() -> tuple[Pattern, ...]:
    found = pkgutil.iter_modules(import_module("fxfuse.patterns").__path__)
    folders = sorted(module.name for module in found if module.ispkg)
    return tuple(ordered([import_module(f"fxfuse.patterns.{name}").PATTERN for name in folders]))


def shipped() -> list[Pattern]:
    """The patterns that come with fxfuse, one in each folder of `fxfuse.patterns`, in the order in which they apply."""
    return list(_shipped())


def ordered(patterns: Sequence[Pattern]) -> list[Pattern]:
    """The patterns by what they say of themselves; where nothing is said they stay as they come.

    A pattern may name others: `after`, those that apply before it does, and `before`, those that apply after it.
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for pattern in patterns:
        sorter.add(pattern.name, *getattr(pattern, "after", ()))
        for later in getattr(pattern, "before", ()):
            sorter.add(later, pattern.name)
    sorter.prepare()
    named = {pattern.name: pattern for pattern in patterns}
    place = {name: number for number, name in enumerate(named)}
    found: list[Pattern] = []
    ready = list(sorter.get_ready())
    while ready:
        name = min(ready, key=lambda name: place.get(name, -1))
        ready.remove(name)
        sorter.done(name)
        ready += sorter.get_ready()
        if name in named:
            found.append(named[name])
    return found


def catalogue() -> list[Pattern]:
    """All patterns, in the order in which `fuse` applies them: registered here, other packages', shipped.

    A user's pattern comes first: it is more specific than what it is made of.

    What another package registers and cannot be loaded, or is no pattern, is left out, and an `FxfuseWarning` names it:
    it must not take every export down.
    """
    found: list[Pattern] = list(_registered)
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
        except Exception as error:
            _warn(point, f"cannot be loaded: {type(error).__name__}: {error}")
            continue
        if not is_pattern(loaded):
            _warn(point, "is not a pattern")
            continue
        found.append(loaded)
    return found + shipped()


def _warn(point: EntryPoint, what: str) -> None:
    where = f"entry point {point.name} = {point.value} of the group {GROUP}"
    warnings.warn(f"a pattern was left out: the {where} {what}", FxfuseWarning, stacklevel=callers_level())
