"""What is noted of a fusion while it runs: why something was not fused, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.source import module_path, source_line
from fxfuse.recognise.answers import Input, Pattern
from fxfuse.recognise.probe import OutOfTime
from fxfuse.report.model import Entry, Report
from fxfuse.report.refusals import failed, name_of

T = TypeVar("T")


@dataclass
class Notes:
    """Of one run."""

    report: Report
    held_back: list[Entry] | None = None
    """Where entries go instead of the report, as long as it is not known whether they are to be said."""
    at: dict[Node, list[Entry]] = field(default_factory=dict)
    """What was noted of each anchor by the pattern that is applied now."""

    @property
    def entries(self) -> list[Entry]:
        return self.report.entries if self.held_back is None else self.held_back

    @contextmanager
    def holding_back(self) -> Iterator[list[Entry]]:
        """Within the block entries go to this list."""
        held: list[Entry] = []
        self.held_back = held
        try:
            yield held
        finally:
            self.held_back = None

    def take_back(self, entries: Collection[Entry]) -> None:
        """These are not to be said after all."""
        self.entries[:] = [e for e in self.entries if all(e is not one for one in entries)]

    def note(
        self,
        pattern: Pattern,
        status: Literal["refused", "near miss"],
        nodes: Sequence[Node],
        anchor: Node | None,
        *,
        reason: str,
        parameters: dict[str, object] | None = None,
    ) -> Entry:
        entry = Entry(
            operator=str(pattern.operator),
            name=name_of(str(pattern.operator), reason, anchor),
            status=status,
            nodes=tuple(n.name for n in nodes),
            parameters=parameters or {},
            reason=reason,
            source=source_line(anchor) if anchor is not None else None,
            module=module_path(anchor) if anchor is not None else None,
        )
        self.entries.append(entry)
        if anchor is not None:
            self.at.setdefault(anchor, []).append(entry)
        return entry

    def guarded(self, pattern: Pattern, items: Iterator[T], anchor: Node | None = None) -> Iterator[T]:
        """Pass items on; where making one fails, say so and stop: a pattern must not take the export down."""
        try:
            yield from items
        except OutOfTime:
            raise
        except Exception as error:
            why = failed(pattern, "could not propose", error)
            nodes = (anchor,) if anchor is not None else ()
            self.note(pattern, "near miss", nodes, anchor, reason=why)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """The time that the block takes is that stage's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + time.perf_counter() - started

    def timed(self, stage: str, make: Callable[[], Iterable[T]]) -> Iterator[T]:
        """Pass items on, counting the time it takes to make them."""
        with self.clock(stage):
            iterator = iter(make())
        while True:
            with self.clock(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


def with_names(parameters: dict[str, Any], region: Region) -> dict[str, Any]:
    """Parameters of an answer for the report: tensors are called as the region's inputs are."""

    def name(value: Any) -> Any:
        if callable(value):
            return value(region)
        if isinstance(value, list):
            return [name(v) for v in value]
        return region.inputs[value.position].name if isinstance(value, Input) else value

    return {key: name(value) for key, value in parameters.items()}
