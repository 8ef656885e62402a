"""Breaks that the caller overrules by name: what is taken for granted then, and beyond which values the two differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from fxfuse.graph.region import Region
from fxfuse.graph.source import place_of
from fxfuse.graph.view import CAST, argument, fake, op_name
from fxfuse.proof.breaks import Break

BOUNDS = {
    "clamp": ("min", "max"),
    "clip": ("min", "max"),
    "clamp_min": ("min", None),
    "clamp_max": (None, "max"),
    "hardtanh": ("min_val", "max_val"),
    "relu6": (0.0, 6.0),
    "relu": (0.0, None),
    "maximum": ("other", None),
    "minimum": (None, "other"),
    "nan_to_num": (None, None),
}
"""Breaks that give their operand back between two bounds; each bound is an argument by its name, or a number."""


def break_name(node: Node) -> str:
    """``"clamp@model.py:12"``: what a refusal names the call by."""
    place = place_of(node)
    return f"{op_name(node)}@{place}" if place else op_name(node)


def accepted(region: Region, breaks: Iterable[Break], accept: frozenset[str]) -> dict[str, str]:
    """The names that were accepted in this region, each with what differs because of it."""
    found: dict[str, str] = {}
    by_node = {one.node: one for one in breaks}
    for node in region.nodes if accept else ():
        name = break_name(node)
        if name in accept and (what := _what(node, by_node.get(node), region)) is not None:
            found[name] = f"accepted {name}: {what}"
    for one in by_node.values():  # of the user's example, which has no nodes
        if one.node is None and one.name in accept:
            found[one.name] = f"accepted {one.name}: not all of its pieces were compared"
    return found


def _what(node: Node, one: Break | None, region: Region) -> str | None:
    """In which values model and operator differ if this call is accepted; None where they do not."""
    name = op_name(node)
    if name in BOUNDS:
        low, high = (_bound(node, bound) for bound in BOUNDS[name])
        beyond = {} if one is None else one.beyond
        sides = [f"below {low}"] if low is not None and "below" not in beyond else []
        sides += [f"above {high}"] if high is not None and "above" not in beyond else []
        if name == "nan_to_num":
            sides = ["infinite or no number"]
        return f"where what it bounds is {' or '.join(sides)}, model and operator differ" if sides else None
    if one is not None and one.fill is not None:
        return f"{one.fill:g} hides keys; where scores come near it, model and operator differ"
    if name in CAST:
        kinds = fake(node).dtype, fake(region.output).dtype
        return f"the model rounds to {str(kinds[0]).removeprefix('torch.')} there, the operator does not"
    missing = [] if one is None else one.missing
    return f"nothing was compared where it is {' or '.join(missing)}" if missing else None


def _bound(node: Node, bound: Any) -> str | None:
    value = argument(node, bound) if isinstance(bound, str) else bound
    if value is None:
        return None
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
