"""What autocast does to a call, read off torch itself.

A graph under `torch.autocast` does not say what is cast: the dispatcher does it when the call runs. So each call is run
on its fake tensors with autocast on, and what arrives below is compared with what arrives when its operands are cast
beforehand and autocast is off. Where the two are alike the casts can be written down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from fxfuse.graph.view import LAYOUT, op_name, tensor
from fxfuse.torch_seams import (
    FAKE_LOGGERS,
    OpOverload,
    TorchDispatchMode,
    entered,
    has_autocast,
    pytree,
    refusing_guards,
    schema_of,
    silenced,
)

Casts = dict[int, torch.dtype]
"""For the tensors among a call's inputs, by `all_input_nodes`, the type that they are cast to."""


def casts_of(node: Node, modes: Mapping[str, torch.dtype], known: dict[Any, Casts | None]) -> Casts | None:
    """The casts that autocast puts before this call; None where they cannot be said.

    Args:
        modes: the devices on which autocast is on, and the type that it casts to.
        known: what was found of calls of the same kind.
    """
    values = [tensor(i) for i in node.all_input_nodes]
    devices = {v.device.type for v in values if v is not None and v.dtype.is_floating_point and v.device.type in modes}
    if not devices or op_name(node) in LAYOUT - {"cat", "stack", "concat", "concatenate", "hstack", "getitem"}:
        return {}
    if node.target is torch.ops.aten.to.dtype or getattr(node.target, "__module__", "") == "_operator":
        return {}
    if len(devices) > 1 or not isinstance(node.target, OpOverload):
        return None
    (device,) = devices
    dtype = modes[device]
    shapes = [None if v is None else (v.dtype, v.device, tuple(map(str, v.shape))) for v in values]
    rest = map_aggregate((node.args, dict(node.kwargs)), lambda a: None if isinstance(a, Node) else repr(a))
    key = node.target, str(shapes), str(rest), device, dtype
    if key not in known:
        known[key] = _found(node, device, dtype)
    return known[key]


def _found(node: Node, device: str, dtype: torch.dtype) -> Casts | None:
    mode = torch.autocast(device, dtype, cache_enabled=False)
    if not has_autocast(mode):  # this machine has no such device, so that torch cannot be asked what it would cast
        return None
    seen = _arrives(node, {}, mode)
    if seen is None:
        return None
    if not any(call.name == "_to_copy" for call in seen):
        return {}
    plain = _arrives(node, {}, nullcontext())
    if plain == seen:
        return {}
    if schema_of(node.target).is_mutable:
        return None
    first = list(takewhile(lambda call: call.given is not None, seen))
    direct = {call.given: call.types[-1] for call in first if call.given is not None}
    if direct and _arrives(node, direct, nullcontext()) == seen[len(first) :]:
        return direct
    kinds = {i: v.dtype for i, n in enumerate(node.all_input_nodes) if (v := tensor(n)) is not None}
    wanted = dtype if direct else next(c.types[-1] for c in seen if c.name == "_to_copy")
    all_of_them = {i: wanted for i, kind in kinds.items() if kind.is_floating_point and kind != wanted}
    cast = _arrives(node, all_of_them, nullcontext())
    if cast is None or any(c.name == "_to_copy" for c in cast) or _computed(cast) != _computed(seen):
        return None
    return all_of_them


@dataclass(frozen=True)
class _Call:
    """One operator that runs."""

    name: str
    types: tuple[torch.dtype, ...]
    """Of its tensors, the result last."""
    given: int | None = field(default=None, compare=False)
    """Which of the inputs it was given, where it is a cast."""


def _arrives(node: Node, casts: Casts, mode: AbstractContextManager[Any]) -> list[_Call] | None:
    """The operators that run below this call; None where it cannot run on fake tensors."""
    fakes: dict[Node, Any] = {n: n.meta.get("val") for n in node.all_input_nodes}
    mutable = schema_of(node.target).is_mutable
    fake_mode = next((f.fake_mode for f in fakes.values() if hasattr(f, "fake_mode")), None)
    if fake_mode is None or any(v is None for v in fakes.values()):
        return None
    try:
        with entered(fake_mode), torch.no_grad(), refusing_guards(fake_mode.shape_env), silenced(*FAKE_LOGGERS):
            for place, n in enumerate(node.all_input_nodes):
                if place in casts:
                    fakes[n] = fakes[n].to(casts[place])
                elif mutable and tensor(n) is not None:
                    fakes[n] = fakes[n].clone()
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: fakes[n])
            with mode, _Seen(list(fakes.values())) as seen:
                node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # whatever it needs that fake tensors do not have, or mixed types: then nothing is known of it
        return None
    found: list[_Call] = seen.calls
    return found


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that runs, with the types of its tensors."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = inputs
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _tensors(result):  # a call without tensors asks for a device or a size, and computes nothing
            name = schema_of(func).name.partition("::")[2]
            given = next((i for i, v in enumerate(self.inputs) if name == "_to_copy" and v is args[0]), None)
            found = tuple(t.dtype for t in _tensors((args, kwargs or {}, result)))
            self.calls.append(_Call(name, found, given))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]


def _computed(calls: Sequence[_Call]) -> list[_Call]:
    """The calls that compute. Casts and moves are left out: it makes no difference on which side of a transpose a cast
    stands."""
    return [c for c in calls if c.name not in LAYOUT and c.name != "_to_copy"]
