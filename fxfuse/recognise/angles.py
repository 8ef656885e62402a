"""Do both rows of each pair use one angle? Their elements are followed to where they are computed."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.proof.claims import equal_terms
from fxfuse.proof.positions import Index, Unreadable
from fxfuse.proof.terms import Term
from fxfuse.recognise.answers import Reason
from fxfuse.recognise.caches import Cache, find_cache
from fxfuse.recognise.questions import Questions

_PAIR = "pair"


def one_angle(
    region: Region, others: list[torch.Tensor], rows: tuple[torch.Tensor, ...], ask: Questions
) -> str | Reason:
    """How it was decided that they do, at every position; or why they may not.

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
        ask.reader.opaque = True
        try:
            term = ask.reader.read(node, _index(cache, node, ask))
        except Unreadable as error:
            return Reason(f"a rotation, but whether both rows of a pair use one angle cannot be told: {error}", 3)
        finally:
            ask.reader.opaque = False
        terms.append(ask.reader.terms.negative(term) if cache.negative else term)
    cos, other_cos, sin, minus_sin = terms
    reader = ask.reader
    alike = equal_terms(reader, cos, other_cos, _PAIR)
    if alike and _either(ask, sin, minus_sin):
        return "both rows of a pair use one angle (by structure)"
    reflected = alike and equal_terms(reader, sin, minus_sin, _PAIR)
    why = "the signs of sin agree (a reflection)" if reflected else "their cos or sin are computed differently"
    return Reason(f"a rotation but for the angles of the two rows of a pair: {why}", 3)


def _either(ask: Questions, sin: Term, minus_sin: Term) -> bool:
    negative = ask.reader.terms.negative
    return equal_terms(ask.reader, negative(sin), minus_sin, _PAIR) or equal_terms(
        ask.reader, sin, negative(minus_sin), _PAIR
    )


def _index(cache: Cache, node: Node, ask: Questions) -> Index:
    """Where the element of a pair stands in the tensor that it is read from."""
    t = ask.reader.terms
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
            found.append(ask.reader.place(f"axis {step.axis}", size))
    return tuple(found)
