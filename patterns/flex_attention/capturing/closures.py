"""The tensors that a function has captured, taken out of it, and put into a copy of it.

A mask function is a closure over document ids, lengths or tables. As an input of an exported program each tensor has
to be an input of its own; what remains, the code and its constants, is part of the call's structure, and is compared.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxfuse.torch_seams import pytree

Function = Callable[..., Any]


@dataclass(frozen=True)
class Slot:
    """Where the tensor of this number belongs."""

    number: int


@dataclass(frozen=True)
class Skeleton:
    """A closure or a `functools.partial` without its tensors. Equal skeletons compute the same on equal tensors."""

    code: types.CodeType | None
    """None is a partial."""
    globals: _Same
    defaults: tuple[Any, ...]
    entries: tuple[Any, ...]
    """What the cells hold, flat: tensors as `Slot`, functions as `Skeleton`."""
    structure: pytree.TreeSpec
    make: Function = field(compare=False)
    """Of what the cells hold, the closure."""

    def __deepcopy__(self, memo: Any) -> Skeleton:
        return self  # programs are copied with the structure of their call, and the globals of a module cannot be

    def function(self, tensors: Sequence[torch.Tensor]) -> Function:
        """The function, with these tensors in the slots."""
        function: Function = _filled(self, tensors)
        return function


class _Same:
    """Compares by identity: the globals of a module may hold anything, and are compared with themselves only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def without_tensors(function: Function) -> tuple[Skeleton | Function, list[torch.Tensor]]:
    """`function` without the tensors of its closure (and of the closures in there), and those, each once.

    What is no closure (a plain function, a bound method, a module) comes back as it is.
    """
    tensors: list[torch.Tensor] = []
    return _emptied(function, tensors, ()), tensors


def with_tensors(function: Skeleton | Function, tensors: Sequence[torch.Tensor]) -> Function:
    """What `without_tensors` took apart, with these tensors in the places of its own."""
    return function.function(tensors) if isinstance(function, Skeleton) else function


def _emptied(value: Any, tensors: list[torch.Tensor], inside: tuple[int, ...]) -> Any:
    if isinstance(value, torch.Tensor):
        number = next((i for i, t in enumerate(tensors) if t is value), len(tensors))
        if number == len(tensors):
            tensors.append(value)
        return Slot(number)
    if id(value) in inside:  # a function that captured itself
        return value
    code, namespace, defaults, held = _parts(value)
    if held is None:
        return value
    leaves, structure = pytree.tree_flatten(held)
    entries = tuple(_emptied(leaf, tensors, (*inside, id(value))) for leaf in leaves)
    if not any(isinstance(entry, (Slot, Skeleton)) for entry in entries):
        return value
    make = functools.partial if code is None else _maker(code, namespace, defaults)
    return Skeleton(code, _Same(namespace), defaults, entries, structure, make)


def _parts(value: Any) -> tuple[types.CodeType | None, Any, tuple[Any, ...], tuple[Any, ...] | None]:
    """Code, globals, defaults and what is held; the last is None where there is nothing to look into."""
    if isinstance(value, functools.partial):
        return None, None, (), (value.func, value.args, dict(value.keywords))
    if isinstance(value, types.FunctionType) and value.__closure__ and not value.__kwdefaults__:
        try:
            held = tuple(cell.cell_contents for cell in value.__closure__)
        except ValueError:  # a cell that is filled only later
            held = None
        return value.__code__, value.__globals__, value.__defaults__ or (), held
    return None, None, (), None


def _filled(entry: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(entry, Slot):
        return tensors[entry.number]
    if not isinstance(entry, Skeleton):
        return entry
    held = pytree.tree_unflatten([_filled(e, tensors) for e in entry.entries], entry.structure)
    if entry.code is None:
        function, args, keywords = held
        return entry.make(function, *args, **keywords)
    return entry.make(*held)


def _maker(code: types.CodeType, namespace: dict[str, Any], defaults: tuple[Any, ...]) -> Function:
    """A function of what the cells hold that defines the closure, as the function did that it came from.

    Torch's dynamo, which traces how an argument is put together, follows a definition and knows no `types.CellType`.
    """
    names = ", ".join(code.co_freevars)
    given = ", ".join(f"_{i}=_defaults[{i}]" for i in range(len(defaults)))
    text = f"def make({names}, *, _defaults=()):\n    def inner({given}): return ({names},)\n    return inner"
    compiled = compile(text, __file__, "exec")
    make = next(c for c in compiled.co_consts if isinstance(c, types.CodeType))
    # Both name what they hold in the same order, which is the compiler's own.
    consts = tuple(code if isinstance(c, types.CodeType) else c for c in make.co_consts)
    made = types.FunctionType(make.replace(co_consts=consts), namespace, "make")
    made.__kwdefaults__ = {"_defaults": defaults}
    return made
