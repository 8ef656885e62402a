"""What a caller may ask of a decoder's graph, and what does not go together. It is checked before a model is loaded."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fxfuse.decoder.forms.static import Profile
from fxfuse.decoder.names import Names
from fxfuse.errors import FxfuseError

Cache = Literal["auto", "growing", "static", "sliding", "streaming"]
SINKS = 4
"""How many of the first tokens a streaming cache keeps if the caller does not say: what its paper found to be
enough."""


def check_decoder_options(
    *,
    opset: int,
    cache: Any = "auto",
    names: Any = "optimum",
    profile: Any = "cpu",
    ragged: bool = False,
    one_token: bool = False,
    sinks: int | None = None,
    window: int | None = None,
) -> None:
    """Checks the options of `fxfuse.decoder.export.export_decoder`; `one_token` is True for a pair of graphs, too.

    Raises:
        FxfuseError: an option has a value that is not known, or some do not go together.
    """
    for where, value, known in (("cache", cache, Cache), ("profile", profile, Profile), ("names", names, Names)):
        if value not in get_args(known):
            raise FxfuseError(f"unknown {where}={value!r}", where=where, hint=" or ".join(map(repr, get_args(known))))
    if profile == "cuda" and cache != "static":
        raise FxfuseError(
            "profile chooses between kinds of static caches; any other is the same for every device",
            where="profile",
            hint='cache="static"',
        )
    if ragged and cache != "static":
        raise FxfuseError(
            "only in a static cache may rows have lengths of their own: in any other all are of one length",
            where="ragged",
            hint='cache="static"',
        )
    if cache in ("static", "sliding", "streaming") and names == "hf":
        raise FxfuseError(f"transformers has no names for a {cache} cache", where="names", hint='names="optimum"')
    if cache in ("static", "sliding") and opset < 24:
        raise FxfuseError(
            f"a {cache} cache needs TensorScatter, which opset 24 brought", where="opset", hint="opset=24"
        )
    if cache == "streaming":
        if one_token and opset < 24:
            raise FxfuseError(
                "a streaming cache's graph for one token needs TensorScatter, which opset 24 brought",
                where="opset",
                hint="opset=24",
            )
        if window is None or window < 1:
            raise FxfuseError(f"a streaming cache needs a window, not {window}", where="window", hint="window=1020")
        if sinks is not None and sinks < 0:
            raise FxfuseError(f"a streaming cache has 0 sinks or more, not {sinks}", where="sinks", hint="sinks=4")
        return
    for where, number, what in (("sinks", sinks, "sinks"), ("window", window, "a window")):
        if number is not None:
            raise FxfuseError(f"only a streaming cache has {what} to choose", where=where, hint='cache="streaming"')
