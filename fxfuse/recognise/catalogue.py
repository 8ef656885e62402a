"""Which patterns there are: the shipped catalogue, those of other packages, and those registered here."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from fxfuse.errors import FxfuseError
from fxfuse.recognise.answers import Pattern

SHIPPED = ("rms_norm", "rotary_embedding", "attention", "flex_attention", "kv_cache")
"""Modules of `fxfuse.patterns`, in the order in which they are applied: attention looks through rotary embeddings, and
a cache is one where an attention reads it."""
GROUP = "fxfuse.patterns"
_registered: list[Pattern] = []


def register(pattern: Pattern) -> None:
    """Add a pattern to the catalogue of this process; one of the same name is replaced."""
    _registered[:] = [p for p in _registered if p.name != pattern.name] + [pattern]


def unregister(name: str) -> None:
    """Take a registered pattern out again."""
    _registered[:] = [p for p in _registered if p.name != name]


def shipped() -> list[Pattern]:
    """The patterns that come with fxfuse."""
    return [import_module(f"fxfuse.patterns.{name}").PATTERN for name in SHIPPED]


def catalogue() -> list[Pattern]:
    """All patterns, in the order in which `fuse` applies them: registered here, other packages', shipped.

    A user's pattern comes first: it is more specific than what it is made of.

    Raises:
        FxfuseError: a package's entry point cannot be loaded or is not a pattern.
    """
    found: list[Pattern] = list(_registered)
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
        except Exception as error:
            raise FxfuseError(
                f"pattern {point.name} cannot be loaded: {error}", where=f"entry point {point.value}"
            ) from error
        if not isinstance(loaded, Pattern):
            raise FxfuseError(f"{point.value} is not a pattern", where=f"entry point {point.name}")
        found.append(loaded)
    return found + shipped()
