"""Do both rows of each pair use one angle? The elements that they use are followed back to where they are computed."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.patterns.rotary_embedding.tables import Cache, find_cache
from fxfuse.proof.positions.claims import equal_terms
from fxfuse.proof.positions.reader import Index, Reader, Unreadable
from fxfuse.proof.positions.terms import Term
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.probe import Probe, may_change

_PAIR = "pair"


def while_loaded(region: Region, others: list[torch.Tensor], rows: tuple[torch.Tensor, ...], ask: Probe) -> str | None:
    """A note for the report if both rows use one angle only until other values are loaded into a buffer; else None.

    x is then rotated twice, by the angle of each row, and half of either result is kept. That is right whatever is
    loaded.
    """
    ask.read_leaves = True
    buffers = ask.loaded(region.others)
    if not buffers or isinstance(one_angle(region, others, rows, ask.frozen_reader), Reason):
        return None
    return f"rotated by the angle of either row of a pair, for they may come to differ: {may_change(buffers)}"


def one_angle(
    region: Region, others: list[torch.Tensor], rows: tuple[torch.Tensor, ...], reader: Reader
) -> str | Reason:
    """How it was decided that both rows use one angle at every position; or the reason why they may not.

    Args:
        others: the unique values that the rows were measured with.
        rows: cos, the other cos, sin, and what should be -sin, each ``[*positions, pairs]``.
    """
    terms: list[Term] = []
    for what, values in zip(("cos", "cos", "sin", "sin"), rows, strict=True):
        cache = find_cache(values, others, what)
        if isinstance(cache, Reason):
            return cache
        if cache.part != "whole":
            return Reason("a rotation, but whether both rows of a pair use one angle cannot be told", 3)
        node = region.others[cache.index]
        reader.opaque = True
        try:
            term = reader.read(node, _index(cache, node, reader))
        except Unreadable as error:
            return Reason(f"a rotation, but whether both rows of a pair use one angle cannot be told: {error}", 3)
        finally:
            reader.opaque = False
        terms.append(reader.terms.negative(term) if cache.negative else term)
    cos, other_cos, sin, minus_sin = terms
    alike = equal_terms(reader, cos, other_cos, _PAIR)
    if alike and _either(reader, sin, minus_sin):
        return "both rows of a pair use one angle (by structure)"
    reflected = alike and equal_terms(reader, sin, minus_sin, _PAIR)
    unlike = _unlike(reader, cos, other_cos) if not alike else _unlike(reader, sin, minus_sin)
    why = "the signs of sin agree (a reflection)" if reflected else unlike
    return Reason(f"a rotation but for the angles of the two rows of a pair: {why}", 3)


def _unlike(reader: Reader, one: Term, two: Term) -> str:
    """Why two elements may differ, in words: by what they are read from, if that decides it."""
    both = dict.fromkeys(str(t.args[0]) for t in one.walk() if t.op == "given")
    others = {str(t.args[0]) for t in two.walk() if t.op == "given"}
    names = [name for name in both if name in others and " of graph " not in name]
    given = [name for name in names if name.removeprefix("table ") not in reader.tables]
    if given:
        return (
            f"they are different elements of {_called(given[0])}, which may hold anything (pass cos and sin of half "
            "the width, or let the model compute both halves alike)"
        )
    if names:
        return f"{_called(names[0].removeprefix('table '))} holds different values for them"
    return "their cos or sin are computed differently"


def _called(placeholder: str) -> str:
    """The name that the model has for a buffer or parameter, in quotes."""
    kind, _, name = placeholder.partition("_")
    if kind == "c":
        return "a constant"
    what = {"b": "the buffer ", "p": "the parameter "}.get(kind)
    return f"{placeholder!r}" if what is None or not name else f"{what}{name!r}"


def _either(reader: Reader, sin: Term, minus_sin: Term) -> bool:
    negative = reader.terms.negative
    return equal_terms(reader, negative(sin), minus_sin, _PAIR) or equal_terms(reader, sin, negative(minus_sin), _PAIR)


def _index(cache: Cache, node: Node, reader: Reader) -> Index:
    """Where the element of a pair stands in the tensor that it is read from."""
    t = reader.terms
    found: list[Term] = []
    for step, size in zip(cache.steps, fake(node).shape, strict=True):
        if step.kind == "drop":
            found.append(t.number(0))
        elif step.kind == "select":
            found.append(t.number(step.start))
        elif step.kind == "pair":
            place = t.variable(_PAIR, 0, cache.pairs - 1)
            found.append(t.add(t.number(step.start), t.scale(place, step.step)))
        else:
            found.append(reader.place(f"axis {step.axis}", size))
    return tuple(found)
