"""How a door fuses: what `fxfuse.prepass` and the exporter plugin remember and hand to `fuse`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fxfuse.errors import FxfuseError
from fxfuse.ops.registry import check_opset
from fxfuse.patterns.flex_attention.options import FlexCalls, Windows, check_flex_attention, check_windows
from fxfuse.recognise.answers import Pattern, is_pattern
from fxfuse.recognise.questions import BlockMasks, check_block_masks

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


@dataclass(frozen=True)
class Options:
    """Arguments of `fuse`; checked where they are given, not where they are used much later.

    Raises:
        FxfuseError: an opset outside 23–25, something that is no pattern, an option that is none.
    """

    opset: int | None = None
    """None is the opset of the export, or 24 where there is none."""
    patterns: Sequence[Pattern] | None = None
    """None is the whole catalogue."""
    verify: Literal["on", "off"] = "on"
    block_mask: BlockMasks = "check"
    flex_attention: FlexCalls = "standard"
    windows: Windows = "mask"
    frozen: bool | None = None
    """None is True on the way to ONNX, whose file holds the values of the buffers, and False where the program stays a
    program."""
    accept: Sequence[str] = ()
    budget: float = BUDGET
    strict: bool = False

    def __post_init__(self) -> None:
        if self.opset is not None:
            check_opset(self.opset)
        if self.verify not in ("on", "off"):
            raise FxfuseError(f"unknown verify={self.verify!r}", where="verify", hint='"on" or "off"')
        check_block_masks(self.block_mask)
        check_flex_attention(self.flex_attention)
        check_windows(self.windows, self.opset)
        if self.frozen is not None:
            check_frozen(self.frozen)
        check_accept(self.accept)
        check_budget(self.budget)
        check_strict(self.strict)
        if self.patterns is not None:
            check_patterns(self.patterns)

    def for_export(self, opset: int) -> dict[str, Any]:
        """Keyword arguments of `fuse` for an export at `opset`: nothing newer than either of the two."""
        frozen = self.frozen is None or self.frozen
        opset = opset if self.opset is None else min(opset, self.opset)
        return {**self.arguments, "opset": opset, "frozen": frozen}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `fuse`."""
        return {
            "opset": self.opset or DEFAULT_OPSET,
            "patterns": self.patterns,
            "verify": self.verify,
            "block_mask": self.block_mask,
            "flex_attention": self.flex_attention,
            "windows": self.windows,
            "frozen": bool(self.frozen),
            "accept": tuple(self.accept),
            "budget": self.budget,
            "strict": self.strict,
        }
