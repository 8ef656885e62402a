"""Which dimensions are asked to be dynamic, in whatever style: `Dim`, a name, ``Dim.AUTO`` or ``Dim.DYNAMIC``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.export import Dim
from torch.export import dynamic_shapes as torch_shapes

from fxfuse.torch_seams import pytree, user_error

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Asked:
    """One dimension of one input, or an input that is a number."""

    leaf: int
    """Its place among all inputs, flattened."""
    axis: int | None
    """Its axis; None where the input is a number."""
    dim: Any = field(compare=False)
    size: int = field(compare=False)
    """What it is in the sample."""
    where: str
    """``"x.shape[1]"``"""

    @property
    def strict(self) -> bool:
        """Is it an error if it does not become dynamic? With ``Dim.AUTO`` the caller leaves that open."""
        return hint(self.dim) != "AUTO"

    @property
    def group(self) -> Any:
        """What dimensions have in common that were given one name, and so have to have one size."""
        named = isinstance(self.dim, (str, Dim)) and hint(self.dim) is None
        return ("named", name_of(self.dim)) if named else (self.leaf, self.axis)


def at(dims: Sequence[Asked], inputs: Inputs) -> list[Asked]:
    """The same dimensions at the sizes that they have in these inputs."""
    leaves = pytree.tree_leaves(inputs)
    return [replace(d, size=leaves[d.leaf] if d.axis is None else leaves[d.leaf].shape[d.axis]) for d in dims]


@dataclass(frozen=True)
class _Leaf:
    place: int
    value: Any


def hint(dim: Any) -> str | None:
    """``"AUTO"``, ``"DYNAMIC"`` or ``"STATIC"``; None of what is none of these three."""
    kind = getattr(dim, "type", None)
    return getattr(kind, "name", None)


def name_of(dim: Any) -> str:
    """The name that a string or a `Dim` gives."""
    return dim if isinstance(dim, str) else str(dim.__name__)


def is_dynamic(dim: Any) -> bool:
    return isinstance(dim, str) or hint(dim) in ("AUTO", "DYNAMIC") or (hint(dim) is None and isinstance(dim, Dim))


def asked(module: torch.nn.Module, inputs: Inputs, dynamic_shapes: Any) -> tuple[Asked, ...]:
    """All dimensions that `dynamic_shapes` asks to be dynamic; none where it does not fit the inputs."""
    if dynamic_shapes is None:
        return ()
    leaves, structure = pytree.tree_flatten(inputs)
    args, kwargs = pytree.tree_unflatten([_Leaf(i, leaf) for i, leaf in enumerate(leaves)], structure)
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:  # torch.export says what is wrong
        return ()
    given: Any = dict(bound)
    if not isinstance(dynamic_shapes, dict):
        given = list(bound.values())
    elif (extra := _keywords(module)) is not None and extra in given and extra not in dynamic_shapes:
        given.update(given.pop(extra))
    return tuple(dict.fromkeys(_walk(given, dynamic_shapes, "", list(bound))))


def _keywords(module: torch.nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)


def _walk(value: Any, spec: Any, path: str, names: Sequence[str] = ()) -> Iterator[Asked]:
    if spec is None:
        return
    if isinstance(value, _Leaf):
        if isinstance(value.value, torch.Tensor):
            axes = (
                spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, (tuple, list)) else ()
            )
            for axis, dim in axes:
                if isinstance(axis, int) and -value.value.dim() <= axis < value.value.dim() and is_dynamic(dim):
                    axis %= value.value.dim()
                    yield Asked(value.place, axis, dim, value.value.shape[axis], f"{path}.shape[{axis}]")
        elif is_dynamic(spec) and isinstance(value.value, int):
            yield Asked(value.place, None, spec, value.value, path)
        return
    children, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    specs = _children(spec)
    for place, (key, child) in enumerate(children):
        name = getattr(key[0], "key", getattr(key[0], "name", getattr(key[0], "idx", place)))
        inner = specs.get(name, specs.get(place)) if isinstance(specs, dict) else None
        if not path and names:
            said = name if isinstance(name, str) else names[place]
        else:
            said = path + pytree.keystr(key)
        yield from _walk(child, inner, said)


def _axes(spec: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(spec, dict):
        yield from spec.items()
    elif isinstance(spec, (tuple, list)):
        yield from enumerate(spec)


def _children(spec: Any) -> dict[Any, Any]:
    """The parts of a `dynamic_shapes` by key, name and place."""
    if isinstance(spec, dict):
        return dict(spec)
    parts, _ = pytree.tree_flatten_with_path(spec, is_leaf=lambda part: part is not spec)
    found: dict[Any, Any] = {}
    for place, (key, part) in enumerate(parts):
        if key:
            found[getattr(key[0], "key", getattr(key[0], "name", place))] = part
            found[place] = part
    return found


def for_torch(dynamic_shapes: Any, dims: Sequence[Asked]) -> Any:
    """`dynamic_shapes` as ``torch.export.export`` takes them.

    A dimension that is only a name is ``Dim.DYNAMIC``. A `Dim` starts at 2 where the sample is larger than 1: torch
    asks of sizes whether they are 1, and otherwise refuses the answer.
    """
    from_two = {name_of(d.dim): True for d in dims if isinstance(d.dim, Dim) and hint(d.dim) is None}
    for d in dims:
        if isinstance(d.dim, Dim) and hint(d.dim) is None and d.size < 2:
            from_two[name_of(d.dim)] = False
    made: dict[str, Any] = {}

    numbers = {name_of(d.dim) for d in dims if d.axis is None and hint(d.dim) is None}

    def one(dim: Any) -> Any:
        if isinstance(dim, str) or (hint(dim) is None and isinstance(dim, Dim) and name_of(dim) in numbers):
            return Dim.DYNAMIC  # torch takes no Dim for an input that is a number
        if type(dim) is Dim and from_two.get(dim.__name__) and dim.min < 2:
            if dim.__name__ not in made:
                made[dim.__name__] = Dim(dim.__name__, min=2, max=_number(dim.max))
            return made[dim.__name__]
        return dim

    return mapped(one, dynamic_shapes)


def _number(bound: Any) -> int | None:
    try:
        return int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None


def as_auto(dynamic_shapes: Any) -> Any:
    """`dynamic_shapes` with every dynamic dimension as far as it can be."""
    return mapped(lambda dim: Dim.AUTO if is_dynamic(dim) else dim, dynamic_shapes)


def refined(error: Exception, dynamic_shapes: Any) -> Any | None:
    """`dynamic_shapes` as torch suggests in this error; None where it suggests nothing, or other sizes alone."""
    if not isinstance(error, user_error()) or not isinstance(dynamic_shapes, (dict, tuple, list)):
        return None
    try:
        return torch_shapes.refine_dynamic_shapes_from_suggested_fixes(str(error), dynamic_shapes)
    except Exception:  # it parses a text, and raises whatever does not fit
        return None


def mapped(change: Any, dynamic_shapes: Any) -> Any:
    """`dynamic_shapes` with every dimension changed."""
    if isinstance(dynamic_shapes, dict):
        return {key: mapped(change, value) for key, value in dynamic_shapes.items()}
    if isinstance(dynamic_shapes, tuple) and hasattr(dynamic_shapes, "_fields"):
        return type(dynamic_shapes)(*(mapped(change, value) for value in dynamic_shapes))
    if isinstance(dynamic_shapes, (tuple, list)):
        return type(dynamic_shapes)(mapped(change, value) for value in dynamic_shapes)
    return change(dynamic_shapes)


def named(dynamic_shapes: Any) -> Iterator[str]:
    """The names that `dynamic_shapes` gives to dimensions, as strings or as `Dim`."""
    found: list[str] = []

    def note(dim: Any) -> Any:
        if isinstance(dim, str) or (isinstance(dim, Dim) and hint(dim) is None):
            found.append(name_of(dim))
        return dim

    mapped(note, dynamic_shapes)
    yield from found
