"""`Options`: how to fuse. What a caller says at any door becomes one of these at once, and is handed on as it is.

A door has no list of options of its own: what it is given by keyword goes to `Options.given`, and what it is given
beside what a module was marked with goes to `Options.but`. Options of one pattern are declared by that pattern
(`fxfuse.recognise.declared`).

Three words are kept apart everywhere:

    prove    every rewrite is proven before the graph is touched; ``prove="off"`` trusts what was recognised
    verify   a program that is fused already is proven against its original, from the two alone: `fxfuse.verify`
    check    what was exported is run in ONNX Runtime and its numbers are compared with eager PyTorch's

`fuse` and `prepass` called the first one ``verify=`` once, and still take that name. torch.onnx has a ``verify=`` of
its own, which `fxfuse.onnx.export` hands on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fxfuse.errors import FxfuseError
from fxfuse.ops.opsets import check_opset
from fxfuse.recognise.answers import Pattern, is_pattern
from fxfuse.recognise.catalogue import catalogue
from fxfuse.recognise.declared import check_known, check_opset_of, chosen

DEFAULT_OPSET = 24
"""It has every fused operator, and ONNX Runtime has a kernel for each."""
BUDGET = 60.0
"""Seconds after which `fuse` looks for no more."""
_NAME = re.compile(r"[^@]+(@.+:\d+)?", re.DOTALL)


def check_accept(accept: object) -> None:
    """Raises FxfuseError if it is no list of names as a report gives them."""
    hint = 'a list of names from the report: accept=["clamp@model.py:12"]'
    if isinstance(accept, (str, bytes)) or not isinstance(accept, (Sequence, frozenset, set)):
        raise FxfuseError(f"accept is a list of names, not {accept!r}", where="accept", hint=hint)
    for name in accept:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise FxfuseError(f"{name!r} is no name of a refusal", where="accept", hint=hint)


def check_budget(budget: object) -> None:
    """Raises FxfuseError if it is no number of seconds above 0."""
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or math.isnan(budget) or budget <= 0:  # type: ignore[arg-type, operator]
        raise FxfuseError(f"a budget is a number of seconds above 0, not {budget!r}", where="budget")


def check_patterns(patterns: object) -> None:
    """Raises FxfuseError if it is no list of patterns."""
    if isinstance(patterns, (str, bytes)) or not isinstance(patterns, Sequence):
        raise FxfuseError(f"patterns is a list of patterns, not {patterns!r}", where="patterns")
    for pattern in patterns:
        if not is_pattern(pattern):
            raise FxfuseError(
                f"{pattern!r} is not a pattern",
                where="patterns",
                hint="fxfuse.patterns.rms_norm.PATTERN is one, and what @fxfuse.pattern returns",
            )


def check_frozen(frozen: object) -> None:
    """Raises FxfuseError if it is neither True nor False."""
    if not isinstance(frozen, bool):
        raise FxfuseError(f"frozen is True or False, not {frozen!r}", where="frozen")


def check_strict(strict: object) -> None:
    """Raises FxfuseError if it is neither True nor False."""
    if not isinstance(strict, bool):
        raise FxfuseError(f"strict is True or False, not {strict!r}", where="strict")


def check_prove(prove: object, called: str = "prove") -> None:
    """Raises FxfuseError if it is neither "on" nor "off"."""
    if prove not in ("on", "off"):
        raise FxfuseError(f"unknown {called}={prove!r}", where=called, hint='"on" or "off"')


@dataclass(frozen=True)
class Options:
    """How to fuse; `fxfuse.fuse` says what each of these means. Checked where they are given, not where they are used.

    Raises:
        FxfuseError: an opset outside 23–25, something that is no pattern, an option that is none.
    """

    opset: int | None = None
    """None is the opset of the export, or 24 where there is none."""
    patterns: Sequence[Pattern] | None = None
    """None is the whole catalogue, as it is when something is fused."""
    prove: Literal["on", "off"] = "on"
    frozen: bool | None = None
    """None is True on the way to ONNX, whose file holds the values of the buffers, and False where the program stays a
    program."""
    accept: Sequence[str] = ()
    budget: float = BUDGET
    strict: bool = False
    of_patterns: Mapping[str, Any] = field(default_factory=dict)
    """Options of single patterns, by the keywords that these declare."""

    def __post_init__(self) -> None:
        if self.opset is not None:
            check_opset(self.opset)
        check_prove(self.prove)
        if self.frozen is not None:
            check_frozen(self.frozen)
        check_accept(self.accept)
        check_budget(self.budget)
        check_strict(self.strict)
        if self.patterns is not None:
            check_patterns(self.patterns)
        if self.of_patterns:
            every = [*(self.patterns or ()), *catalogue()]
            check_known(self.of_patterns, every)
            chosen(every, self.of_patterns)
        if self.opset is not None and (self.patterns is not None or self.of_patterns):
            self.chosen(self.opset)

    @classmethod
    def given(cls, **options: Any) -> Options:
        """Options by the keywords that every door takes: those of `fxfuse.fuse`, the patterns' own among them.

        Raises:
            FxfuseError: a keyword that is none, or what the class raises.
        """
        return cls().but(**options)

    def but(self, **options: Any) -> Options:
        """These, with some said anew; None is as it was.

        Raises:
            FxfuseError: a keyword that is none, or what the class raises.
        """
        given = {keyword: value for keyword, value in options.items() if value is not None}
        if "verify" in given:
            check_prove(given["verify"], "verify")
            if given.setdefault("prove", given["verify"]) != given.pop("verify"):
                raise FxfuseError("prove= and verify= are the same option, and differ", where="prove", hint="prove=")
        own = {one.name for one in fields(self)} - {"of_patterns"}
        of_patterns = {keyword: value for keyword, value in given.items() if keyword not in own}
        mine = {keyword: value for keyword, value in given.items() if keyword in own}
        return replace(self, **mine, of_patterns={**self.of_patterns, **of_patterns})

    def for_export(self, opset: int) -> Options:
        """These for an export at `opset`: nothing newer than either of the two, and buffers keep what they hold."""
        frozen = self.frozen is None or self.frozen
        return replace(self, opset=opset if self.opset is None else min(opset, self.opset), frozen=frozen)

    def chosen(self, opset: int) -> list[Pattern]:
        """The patterns that this opset has operators for, in the order in which they are applied, each with its
        options.

        Raises:
            FxfuseError: an option has a value that needs a later opset.
        """
        found = chosen(catalogue() if self.patterns is None else self.patterns, self.of_patterns)
        for pattern in found:
            check_opset_of(pattern, opset)
        return [pattern for pattern in found if pattern.since_opset <= opset]
