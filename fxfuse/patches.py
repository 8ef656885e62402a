"""Replacing functions of others for a while: each is put back when the last block that wants it ends.

A replacement stands for the whole process, so whatever it changes it changes for the threads within a block alone:
it asks a context variable, and does what the original does for all others.
"""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Undo = Callable[[], None]
Patch = tuple[Hashable, Callable[[], Undo]]
"""What is replaced, and how: a function that replaces it and returns what puts it back."""

_lock = threading.RLock()
_applied: dict[Hashable, Undo] = {}
_users: Counter[Hashable] = Counter()
"""How many blocks want each of them."""
originals: dict[str, Callable[..., Any]] = {}
"""What functions with another `body` did before."""
_within: ContextVar[bool] = ContextVar("fxfuse_flex_capture", default=False)


@contextmanager
def applied(patches: Callable[[], Iterable[Patch]], within: ContextVar[bool] = _within) -> Iterator[None]:
    """Within the block, and the blocks nested in it, the patches hold; in other threads `within` is false.

    Patches that are not for flex_attention have a variable of their own: what `here` asks for is flex_attention's.
    """
    wanted: list[Hashable] = []
    with _lock:
        try:
            for name, apply in patches():
                if name not in _applied:
                    _applied[name] = apply()
                _users[name] += 1
                wanted.append(name)
        except BaseException:
            _release(wanted)
            raise
    token = within.set(True)
    try:
        yield
    finally:
        within.reset(token)
        with _lock:
            _release(wanted)


def here() -> bool:
    """Is this thread within the block? What dynamo reads counts as within: it cannot read the variable."""
    return torch.compiler.is_dynamo_compiling() or _within.get()


def attribute(owner: Any, name: str, value: Any) -> Patch:
    """`owner.name` is `value`."""

    def apply() -> Undo:
        own = name in vars(owner)
        before = vars(owner).get(name)
        setattr(owner, name, value)
        return (lambda: setattr(owner, name, before)) if own else (lambda: delattr(owner, name))

    return (id(owner), name), apply


def item(mapping: Any, key: Any, value: Any, changed: Callable[[], object]) -> Patch:
    """`mapping[key]` is `value`; `changed` is called whenever it was set."""

    def apply() -> Undo:
        before = mapping[key]

        def put(what: Any) -> None:
            mapping[key] = what
            changed()

        put(value)
        return lambda: put(before)

    return (id(mapping), key), apply


def body(function: Any, replacement: Callable[..., Any]) -> Patch:
    """`function` runs the code of `replacement`, wherever it is held.

    Most callers hold a function by its name (``from … import …``), where no attribute reaches. `replacement` has no
    closure, and no globals of its own module: it imports what it reads. `originals[function.__name__]` is what
    `function` did.
    """

    def apply() -> Undo:
        before = (function.__code__, function.__defaults__, function.__kwdefaults__)
        original = types.FunctionType(before[0], function.__globals__, function.__name__, before[1])
        original.__kwdefaults__ = before[2]
        originals[function.__name__] = original

        def put(code: Any, defaults: Any, keywords: Any) -> None:
            function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords

        put(replacement.__code__, replacement.__defaults__, replacement.__kwdefaults__)
        return lambda: put(*before)

    return ("body", id(function)), apply


def _release(names: list[Hashable]) -> None:
    for name in reversed(names):
        _users[name] -= 1
        if not _users[name]:
            del _users[name]
            _applied.pop(name)()
