"""Options of one pattern, declared by that pattern. Every door and the command line take them from here.

@dataclass(frozen=True)
class FlexAttention:
    windows: Literal["mask", "attributes"] = option(Literal["mask", "attributes"], help="what a window becomes")

    def __post_init__(self) -> None:
        check_declared(self)

``fuse(program, windows="attributes")``, every other door, and ``fxfuse export --windows attributes`` are then what
``fuse(program, patterns=[…, FlexAttention(windows="attributes"), …])`` is, the other patterns being the catalogue's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fxfuse.errors import FxfuseError
from fxfuse.recognise.answers import Pattern

_DECLARED = "fxfuse option"


@dataclass(frozen=True)
class Declared:
    """One option of a pattern."""

    field: str
    """The pattern's own field."""
    keyword: str
    """What it is called at the doors, where nobody sees which pattern it belongs to."""
    values: tuple[str, ...]
    default: str
    help: str
    """One sentence for ``--help``."""
    since: Mapping[str, int]
    """Values that need an opset, and which one they need."""

    @property
    def flag(self) -> str:
        """What it is called on the command line."""
        return "--" + self.keyword.replace("_", "-")


def option(values: Any, *, help: str, keyword: str | None = None, since: Mapping[str, int] | None = None) -> Any:
    """A field of a pattern that is a frozen dataclass, and that callers may choose at every door.

    Args:
        values: a `Literal` of texts, the first of which is the default.
        help: one sentence for ``--help``: what is chosen here.
        keyword: what it is called at the doors; by default as the field is.
        since: the opset that a value needs, where it is newer than what the pattern needs anyway.
    """
    known = get_args(values)
    if not known or not all(isinstance(value, str) for value in known):
        raise TypeError(f"an option's values are a Literal of texts, not {values!r}")
    told = {"keyword": keyword, "values": known, "help": help, "since": dict(since or {})}
    return dataclasses.field(default=known[0], metadata={_DECLARED: told})


def declared(pattern: object) -> tuple[Declared, ...]:
    """The options of one pattern; most have none."""
    if not dataclasses.is_dataclass(pattern):
        return ()
    found = []
    for one in dataclasses.fields(pattern):
        if (told := one.metadata.get(_DECLARED)) is not None:
            keyword = told["keyword"] or one.name
            found.append(Declared(one.name, keyword, told["values"], told["values"][0], told["help"], told["since"]))
    return tuple(found)


def check_declared(pattern: object) -> None:
    """For the pattern's `__post_init__`.

    Raises:
        FxfuseError: an option has a value that it does not know.
    """
    for one in declared(pattern):
        value = getattr(pattern, one.field)
        if value not in one.values:
            hint = " or ".join(map(repr, one.values))
            raise FxfuseError(f"unknown {one.keyword}={value!r}", where=one.keyword, hint=hint)


def opset_of(pattern: Pattern) -> int:
    """The opset that the values of its options need; 0 where they need none."""
    return max([0, *(one.since.get(getattr(pattern, one.field), 0) for one in declared(pattern))])


def check_opset_of(pattern: Pattern, opset: int) -> None:
    """Raises:
    FxfuseError: an option has a value that this opset has no operator or attribute for.
    """
    for one in declared(pattern):
        value = getattr(pattern, one.field)
        if opset < (since := one.since.get(value, 0)):
            others = [v for v in one.values if one.since.get(v, 0) <= opset]
            raise FxfuseError(
                f"{one.keyword}={value!r} is there from opset {since} on, not in opset {opset}",
                where=one.keyword,
                hint=" or ".join([f"opset {since}", *(f"{one.keyword}={v!r}" for v in others)]),
            )


def keywords(patterns: Iterable[Pattern]) -> dict[str, Declared]:
    """The options of these patterns by the names that they have at the doors; of two of one name the first."""
    found: dict[str, Declared] = {}
    for pattern in patterns:
        for one in declared(pattern):
            found.setdefault(one.keyword, one)
    return found


def chosen(patterns: Iterable[Pattern], given: Mapping[str, Any]) -> list[Pattern]:
    """The patterns, those that have one of the options `given` (by keyword) with it.

    Raises:
        FxfuseError: a value that an option does not know.
    """
    found = []
    for pattern in patterns:
        own = {one.field: given[one.keyword] for one in declared(pattern) if one.keyword in given}
        found.append(dataclasses.replace(pattern, **own) if own else pattern)  # type: ignore[type-var]
    return found


def check_known(given: Mapping[str, Any], patterns: Sequence[Pattern]) -> None:
    """Raises:
    FxfuseError: none of the patterns has an option of one of these names.
    """
    known = keywords(patterns)
    for keyword in given:
        if keyword not in known:
            hint = f"options of the patterns are {', '.join(sorted(known))}" if known else "no pattern has options"
            raise FxfuseError(f"there is no option {keyword!r}", where=keyword, hint=hint)
