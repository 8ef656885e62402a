"""An example run with tensors that are chosen when it first looks at each: which shapes fit where shows at once.

Six tensors can be given in 720 orders, nine in 362880. Nearly all of them fail at the first step that reads two of
them, and so would every order that gives these two places the same: the search goes back to the last choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxfuse.torch_seams import pytree

Results = list[Tensor]


def results_of(value: Any) -> Results | None:
    """What an example gives, as a list; None where it is neither a tensor nor several."""
    several = list(value) if isinstance(value, (tuple, list)) else [value]
    return several if several and all(isinstance(v, Tensor) for v in several) else None


class Search:
    """Every way to give parameters one kind of tensor each (a shape and a type), in which the example runs.

    Args:
        function: called with one tensor for each parameter.
        count: how many parameters there are.
        kinds: the kind of each tensor there is; each is given once.
        values: by kind, the tensor that stands for all of them.
    """

    def __init__(
        self, function: Callable[..., Any], count: int, kinds: Sequence[int], values: Sequence[Tensor]
    ) -> None:
        self.function, self.count, self.kinds, self.values = function, count, kinds, values
        self.raised: Exception | None = None
        """What it raised last."""
        self.ran = False
        self.runs = 0

    def ways(self) -> Iterator[tuple[tuple[int, ...], Results]]:
        """By parameter the kind that it was given; and what the example gives for them."""
        choices: list[int] = []
        while True:
            self.runs += 1
            run = _Run(self, choices)
            results = run.results()
            if results is not None:
                yield tuple(run.given[place] for place in range(self.count)), results
            choices = run.choices
            while choices and (following := self._following(choices)) is None:
                choices.pop()
            if not choices:
                return
            assert following is not None
            choices[-1] = following

    def _following(self, choices: Sequence[int]) -> int | None:
        """The next kind to try at the last choice, if one is left."""
        return next((k for k in sorted(self.left(choices[:-1])) if k > choices[-1]), None)

    def left(self, choices: Sequence[int]) -> list[int]:
        kinds = list(self.kinds)
        for kind in choices:
            kinds.remove(kind)
        return kinds


class _Run(TorchFunctionMode):
    """One run of the example: the first choices are given, each further one is the first kind that is left."""

    def __init__(self, search: Search, choices: Sequence[int]) -> None:
        super().__init__()
        self.search, self.choices = search, list(choices)
        self.places = [torch.empty(0) for _ in range(search.count)]
        """What stands for a parameter until the example looks at it."""
        self.given: dict[int, int] = {}

    def results(self) -> Results | None:
        """What the example gives; None where it fails, or never looks at a parameter."""
        try:
            with torch.no_grad(), self:
                value = self.search.function(*self.places)
            found = results_of(pytree.tree_map(self._bound, value))
        except Exception as error:  # of tensors in the wrong order, say
            self.search.raised = error
            return None
        self.search.ran = True
        return found if len(self.given) == self.search.count else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*pytree.tree_map(self._bound, args), **pytree.tree_map(self._bound, kwargs or {}))

    def _bound(self, value: Any) -> Any:
        place = next((i for i, p in enumerate(self.places) if p is value), None)
        if place is None:
            return value
        if place not in self.given:
            number = len(self.given)
            if number == len(self.choices):
                self.choices.append(min(self.search.left(self.choices)))
            self.given[place] = self.choices[number]
        return self.search.values[self.given[place]]
