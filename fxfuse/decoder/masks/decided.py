"""What a decoder's masks are, at every batch, any number S of new tokens and any number P of earlier ones.

A mask is read element by element off the graph that computes it, and what it is taken for is then decided for all
sizes:

    causal       key j is seen by query i where j <= P + i, and nothing else hides or favours it
    window       the same where P + i - W < j <= P + i as well, and attention_mask[b, j] is not 0
    padding      the value is attention_mask itself, as booleans

A mask that is added is 0 where a key is seen, and hides it elsewhere: with a number that
`fxfuse.proof.positions.claims` takes for one of masks. What cannot be read or decided is not claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from fxfuse.decoder.reading.reader import Index, Reader
from fxfuse.proof.positions.claims import masks_from
from fxfuse.proof.positions.decide import Fails, Holds, Undecided, Verdict, always
from fxfuse.proof.positions.terms import Term, Terms, Unreadable

_MASK, _PLACES = "attention_mask", "position_ids"
_AXES = {"batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"}


class Masks:
    """The masks of one decoder's graph, with the inputs of `fxfuse.decoder.export`.

    Args:
        padded: whether attention_mask may hide keys; where not it is 1, and token s of a row has the position P + s.

    Raises:
        Unreadable: an input has sizes that are none of a decoder's.
    """

    def __init__(self, graph: ir.Graph, *, padded: bool) -> None:
        t = self.terms = Terms()
        self.new, self.past = t.variable("S", 1), t.variable("P")
        for value in graph.inputs:
            if value.name in (_MASK, _PLACES, "input_ids") and value.shape is not None:
                names = {dim.value for dim in value.shape if isinstance(dim, ir.SymbolicDim)}
                if not names <= _AXES:
                    raise Unreadable(f"{value.name}, which has sizes that are none of a decoder's")
                if value.name == "input_ids" and isinstance(value.shape[1], int):
                    self.new = t.number(value.shape[1])
        self.total = t.add(self.past, self.new)
        sizes = {
            "batch_size": t.variable("B", 1),
            "sequence_length": self.new,
            "past_sequence_length": self.past,
            "total_sequence_length": self.total,
        }
        plain = {_MASK: lambda index: t.number(1), _PLACES: lambda index: t.add(self.past, index[-1])}
        self.reader = Reader(t, sizes, {} if padded else plain)
        self._mask = next((value for value in graph.inputs if value.name == _MASK), None)

    def otherwise_than_causal(self, mask: ir.Value) -> str | None:
        """How this mask [.., S, P + S] differs from a causal one, where nothing is padded: the first query and key for
        which it does. None if it is causal: each token sees itself and all before it, and nothing is added to
        scores."""
        t = self.terms
        try:
            row, column, index = self._scores(mask)
            term = self.reader.read(mask, index)
        except Unreadable as error:
            return f"its mask cannot be read: {error}"
        seen, plain = self._seen(mask, term)
        length = t.variable("length")
        given = [*self._within(mask, index), t.equal(length, self.total)]
        smallest = ["length", "P", "i", "j"]
        verdict = self._always(plain, given, smallest)
        if isinstance(verdict, Fails):
            return f"a bias is added to its scores, {_where(verdict, row, column)}"
        if not isinstance(verdict, Undecided):
            expected = t.at_most(column, t.add(self.past, row))
            verdict = self._always(t.equal(seen, expected), given, smallest)
        if isinstance(verdict, Fails):
            return _where(verdict, row, column)
        return f"whether it is causal cannot be told: {verdict.why}" if isinstance(verdict, Undecided) else None

    def reach(self, mask: ir.Value) -> int | None:
        """The shortest distance back at which this mask hides a key, where nothing is padded: W of a sliding window.
        None where it hides no key before the query, or cannot be read.
        """
        t = self.terms
        back = t.variable("back")
        try:
            row, column, index = self._scores(mask)
            key = t.subtract(t.add(self.past, row), back)
            there = tuple(key if place is column else place for place in index)
            seen, _ = self._seen(mask, self.reader.read(mask, there))
        except Unreadable:
            return None
        given = [*self._within(mask, index, but=column), t.at_most(t.number(0), key)]
        verdict = self._always(seen, given, ["back"])
        return verdict.values["back"] if isinstance(verdict, Fails) else None

    def hidden_by_window(self, mask: ir.Value, size: int) -> float | None:
        """The number that this mask adds to a score to hide the key, if it is the mask of a window of that size.

        Returns:
            −inf for a mask of booleans. None where the mask hides anything else than what lies outside of the window,
            after the query or in padding, or cannot be read.
        """
        t = self.terms
        try:
            row, column, index = self._scores(mask)
            term = self.reader.read(mask, index)
            padding = self._kept(index[0] if len(index) == 4 else t.number(0), column)
        except Unreadable:
            return None
        here = t.add(self.past, row)
        near = t.less(t.subtract(here, t.number(size)), column)
        seen, plain = self._seen(mask, term)
        expected = t.every([near, t.at_most(column, here), padding])
        if not isinstance(self._always(t.every([plain, t.equal(seen, expected)]), self._within(mask, index)), Holds):
            return None
        lowest = masks_from(self.reader.type(mask))
        return max((n for n in _numbers(term) if n <= lowest), default=-math.inf)

    def is_padding(self, value: ir.Value) -> bool:
        """Is a value attention_mask itself, as booleans [B, 1, 1, P + S], whatever the mask holds and the sizes are?"""
        reader, t = self.reader, self.terms
        try:
            index = reader.index(value)
            if self._mask is None or len(reader.shape(self._mask)) != 2:
                return False
            batch, total = reader.shape(self._mask)
            if reader.shape(value) != (batch, t.number(1), t.number(1), total):
                return False
            term = t.as_bool(reader.read(value, index))
            same = t.equal(term, self._kept(index[0], index[-1]))
        except Unreadable:
            return False
        return isinstance(self._always(same, self._within(value, index)), Holds)

    def constant(self, condition: ir.Value) -> bool | None:
        """True or False if the condition is that at every element and size; None if it varies or cannot be read."""
        try:
            index = self.reader.index(condition)
            term = self.terms.as_bool(self.reader.read(condition, index))
        except Unreadable:
            return None
        for answer in (True, False):
            claim = term if answer else self.terms.opposite(term)
            if isinstance(self._always(claim, self._within(condition, index)), Holds):
                return answer
        return None

    # ---- pieces

    def _scores(self, mask: ir.Value) -> tuple[Term, Term, Index]:
        """A free row i and column j of the scores, and the index at which the mask [.., S, P + S] is read there.

        Raises:
            Unreadable: the mask's sizes are not those of the scores.
        """
        shape = self.reader.shape(mask)
        if shape[-2:] != (self.new, self.total):
            raise Unreadable(f"it has the sizes {list(shape)}, not those of the scores")
        row, column = self.reader.place("i", self.new), self.reader.place("j", self.total)
        return row, column, (*self.reader.index(mask)[:-2], row, column)

    def _seen(self, mask: ir.Value, term: Term) -> tuple[Term, Term]:
        """Two terms, for an element of the mask: is the key seen? And is that all, so that nothing is added to the
        score of a key that is seen?"""
        t = self.terms
        if term.kind == "bool":
            return term, t.true
        nothing = t.equal(term, t.number(0))
        lowest = masks_from(self.reader.type(mask))
        return nothing, t.any([nothing, t.at_most(term, t.number(lowest))])

    def _kept(self, row: Term, key: Term) -> Term:
        """Is attention_mask at this row of the batch and this key something else than 0?"""
        if self._mask is None:
            raise Unreadable("attention_mask, which there is not")
        return self.terms.as_bool(self.reader.read(self._mask, (row, key)))

    def _within(self, value: ir.Value, index: Index, but: Term | None = None) -> list[Term]:
        t, sizes = self.terms, self.reader.shape(value)
        pairs = zip(index, sizes, strict=True)
        return [t.less(i, size) for i, size in pairs if i.op == "variable" and i is not but]

    def _always(self, claim: Term, given: Iterable[Term], smallest: Iterable[str] = ()) -> Verdict:
        return always(self.terms, claim, [*given, *self.reader.facts], smallest=list(smallest))


def _where(verdict: Fails, row: Term, column: Term) -> str:
    """A sentence that says at which length, query and key a mask is not causal."""

    def at(term: Term) -> int:
        return verdict.values.get("i" if term is row else "j", 0) if term.number is None else int(term.number)

    query, key = verdict.values.get("P", 0) + at(row), at(column)
    does = "does not see" if key <= query else "sees"
    said = f"from length {verdict.values.get('length', query + 1)} on query {query} {does} key {key}"
    return f"{said} (a window?)" if key <= query else said


def _numbers(term: Term) -> list[float]:
    """The constants that a term may be, where it is a choice between some."""
    if term.op == "choose":
        return [*_numbers(term.args[1]), *_numbers(term.args[2])]
    return [] if term.number is None else [float(term.number)]
