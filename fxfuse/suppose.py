"""What would let a region be fused that was not: buffers that keep what they hold, bounds that are accepted.

It is not guessed: the region is asked and proven once more, as if that were so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from fxfuse.graph.region import Region
from fxfuse.graph.view import op_name
from fxfuse.proof.accepted import BOUNDS, break_name
from fxfuse.proof.evaluate import CannotEvaluate
from fxfuse.proof.prove import Refused, prove
from fxfuse.recognise.answers import Found, Pattern
from fxfuse.recognise.probe import OutOfTime, Probe, may_change, written_targets

REGIONS = 3
"""Of one anchor, how many are asked again."""


@dataclass(frozen=True)
class Asking:
    """What the caller allows to be concluded, and until when."""

    frozen: bool
    accept: frozenset[str]
    until: float
    strict: bool = False
    written: dict[int, frozenset[str]] = field(default_factory=dict, compare=False)
    """What each program writes to, which no fusion changes."""

    def of(self, program: ExportedProgram, *, frozen: bool | None = None, accept: Sequence[str] = ()) -> Probe:
        if id(program) not in self.written:
            self.written[id(program)] = written_targets(program)
        return Probe(
            program,
            frozen=self.frozen if frozen is None else frozen,
            strict=self.strict,
            accept=self.accept | frozenset(accept),
            until=self.until,
            written=self.written[id(program)],
        )


@dataclass
class Suppositions:
    """Of one program; each kind of region is asked once."""

    program: ExportedProgram
    asking: Asking
    known: dict[Any, bool] = field(default_factory=dict)
    made: dict[Any, Probe] = field(default_factory=dict)

    def __call__(self, pattern: Pattern, regions: Sequence[Region], ask: Probe, why: str | None) -> str | None:
        """Why none of the regions is fused, and what lets one be; None where nothing that is known of does.

        Args:
            why: what is missing most nearly.
        """
        for region in regions[:REGIONS]:
            if (buffers := self._buffers(pattern, region, ask)) is not None:
                return buffers
            bounds = dict.fromkeys(break_name(n) for n in region.nodes if op_name(n) in BOUNDS)
            names = tuple(n for n in bounds if n not in ask.accept)
            if names and self._hold(pattern, region, ask, names, {"accept": names}):
                named = " and ".join(names)
                only = f"only between the bounds of {named}: accept={list(names)!r} overrules it ({names[0]})"
                return f"{why}; {only}" if why else only
        return None

    def refused(self, pattern: Pattern, region: Region, ask: Probe, why: str, name: str | None) -> str:
        """The refusal, with what overrules it; `name` is the break that it names."""
        if (buffers := self._buffers(pattern, region, ask)) is not None:
            return buffers
        if name is None or name in ask.accept or not self._hold(pattern, region, ask, name, {"accept": (name,)}):
            return why
        return f"{why}; accept={[name]!r} overrules it"

    def _buffers(self, pattern: Pattern, region: Region, ask: Probe) -> str | None:
        buffers = [] if self.asking.frozen else ask.may_change(region.others)
        if buffers and self._hold(pattern, region, ask, tuple(buffers), {"frozen": True}):
            return f"only as long as a buffer stays as it is: {may_change(buffers)}"
        return None

    def _hold(self, pattern: Pattern, region: Region, ask: Probe, key: Any, options: dict[str, Any]) -> bool:
        """Would the region be fused with these options?"""
        held = id(pattern), region.key, key
        if held not in self.known:
            ask.check_time()
            asked = id(pattern), *options, key
            if asked not in self.made:
                self.made[asked] = self.asking.of(self.program, **options)
            self.known[held] = _holds(pattern, region, self.made[asked])
        return self.known[held]


def _holds(pattern: Pattern, region: Region, ask: Probe) -> bool:
    try:
        answer = pattern.recognise(region, ask)
        if not isinstance(answer, Found):
            return False
        prove(region, answer, ask)
        return True
    except OutOfTime:
        raise
    except (Refused, CannotEvaluate):
        return False
    except Exception:  # a user's pattern may raise anything; it was reported when it was asked first
        return False
