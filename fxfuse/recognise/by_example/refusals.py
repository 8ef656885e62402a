"""Why a region that computes the example is left as it is all the same: what the user's own functions say of it.

What they raise is not caught here: the report says which pattern could not be asked, and the line that raised it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.graph.region import Region
from fxfuse.graph.view import fake
from fxfuse.recognise.by_example.lazily import results_of
from fxfuse.torch_seams import fake_mode_of, unguarded


def checked(
    name: str, check: Callable[..., Any], region: Region, order: Sequence[int], scalars: dict[str, Any]
) -> str | None:
    """What `check` says against this region; or what is wrong with the check."""
    fakes = [fake(region.inputs[i]) for i in order]
    mode = fake_mode_of(fakes)
    env = None if mode is None else mode.shape_env
    guards = len(env.guards) if env is not None else 0
    with unguarded(mode):  # in releases that cannot refuse a guard it shows only afterwards
        answer = check(*fakes, **scalars)
    if env is not None and len(env.guards) > guards:
        return f"the check of the pattern {name} asks about a size that may vary"
    if answer is not None and not (isinstance(answer, str) and answer):
        return f"the check of the pattern {name} gives {answer!r}, neither None nor a reason"
    return answer


def unfit(
    name: str,
    example: Callable[..., Any],
    decomposition: Callable[..., Any],
    tensors: Sequence[Tensor],
    scalars: dict[str, Any],
) -> str | None:
    """What is wrong with the decomposition, if it does not give as many values of the same shapes as the example."""
    with torch.no_grad():
        expected, actual = (_shapes(function(*tensors, **scalars)) for function in (example, decomposition))
    if expected == actual:
        return None
    return f"the decomposition of the pattern {name} gives {actual} where the example gives {expected}"


def _shapes(value: Any) -> str:
    results = results_of(value)
    if results is None:
        return f"a {type(value).__name__}"
    return ", ".join(str(list(result.shape)) for result in results)
