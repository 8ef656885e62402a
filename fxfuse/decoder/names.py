"""What the tensors of a cache are called among a graph's inputs and outputs, in layer 3:

names      input                                        output
optimum    past_key_values.3.key                        present.3.key
genai      the same: ONNX Runtime GenAI took the names over
hf         input.past_key_values.layers.3.keys          output.past_key_values.layers.3.keys
           as the installed transformers has them: from 5.24 on input.cache.layers.3.keys, and output
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import onnx_ir as ir

from fxfuse.errors import FxfuseError
from fxfuse.versions import CACHE_NAMES

Names = Literal["optimum", "genai", "hf"]
_OPTIMUM = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_TRANSFORMERS = re.compile(rf"(?P<way>input|output)\.(?:{'|'.join(CACHE_NAMES)})\.(?P<what>.+)")
_LAYER = re.compile(r"layers\.(\d+)\.(key|value)s")


class Place(NamedTuple):
    """Which tensor of the cache an input is, and the output that has it after the call."""

    layer: int
    what: Literal["key", "value"]
    present: str


def place_of(name: str | None) -> Place | None:
    """The place of the input of this name, in whichever of the three ways it is named; None where it is no cache."""
    if match := _OPTIMUM.fullmatch(name or ""):
        return Place(int(match[1]), _what(match), f"present.{match[1]}.{match[2]}")
    given = _TRANSFORMERS.fullmatch(name or "")
    if given is None or given["way"] != "input" or (match := _LAYER.fullmatch(given["what"])) is None:
        return None
    return Place(int(match[1]), _what(match), "output" + given[0].removeprefix("input"))


def is_of_cache(name: str | None) -> bool:
    """Does an input or output of this name belong to a cache? Keys and values do, and what else a cache may hold."""
    return "past_key_values" in (name or "") or _TRANSFORMERS.fullmatch(name or "") is not None


def pasts_of(model: ir.Model) -> list[tuple[Place, ir.Value]]:
    """The inputs that are keys or values of a cache, in their order, each with its place.

    Raises:
        FxfuseError: there are none.
    """
    pasts = [(place, value) for value in model.graph.inputs if (place := place_of(value.name)) is not None]
    if not pasts:
        raise FxfuseError(
            "the graph has no cache: none of its inputs is named past_key_values.N.key or past_key_values.N.value",
            where="cache",
        )
    return pasts


def renamed(name: str, names: Names) -> str:
    """An input's or output's name in an export for `names`, from the one that transformers' exporter gave it.

    Raises:
        FxfuseError: it is of the cache, and neither a layer's keys nor its values, for which only "hf" has names.
    """
    given = _TRANSFORMERS.fullmatch(name)
    if names == "hf" or given is None:
        return name
    match = _LAYER.fullmatch(given["what"])
    if match is None:
        raise FxfuseError(
            f"the cache holds {given['what']}, which has no name in an export for {names}",
            where="names",
            hint='names="hf" keeps the names of transformers',
        )
    way = "past_key_values" if given["way"] == "input" else "present"
    return f"{way}.{match[1]}.{match[2]}"


def _what(match: re.Match[str]) -> Literal["key", "value"]:
    return "key" if match[2] == "key" else "value"
