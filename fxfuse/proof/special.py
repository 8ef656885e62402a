"""Calls whose value in float64 is not what torch gives when it is called in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.view import fake


def default_epsilon(dtype: torch.dtype) -> float:
    """What `rms_norm` adds without an eps: half precision is computed in float32, and takes float32's.

    Source: `rms_norm_composite` in aten/src/ATen/native/layer_norm.cpp of PyTorch.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def unset(value: torch.Tensor) -> torch.Tensor:
    """The value filled with NaN (or the lowest number): a region that reads what nothing was written to shows it."""
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return value.fill_(math.nan)
    return value.fill_(True if value.dtype == torch.bool else torch.iinfo(value.dtype).min)


def is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


def rounded_count(node: Node, args: Any) -> torch.Tensor | None:
    """A cast of whole numbers to half precision, which rounds those above 2048. The model computes with the rounded
    numbers, so that evaluation in float64 has to round them too."""
    source, kind = node.args[0], fake(node).dtype
    if kind not in (torch.float16, torch.bfloat16) or not isinstance(source, Node):
        return None
    before = fake(source).dtype
    if before.is_floating_point or before.is_complex or before == torch.bool or not isinstance(args[0], torch.Tensor):
        return None
    return args[0].to(kind).to(torch.float64)
