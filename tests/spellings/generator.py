"""Hundreds of equal spellings of one meaning, made by composing independent choices.

A meaning (``rms_norm.py``, ``rotary_embedding.py``, ``attention.py``) is one `Model`: a reference that says plainly
what it computes, and a ``spelled`` forward in which every step asks a `Choices` how to write it::

    power = c("square", pow=lambda: x.pow(2), mul=lambda: x * x, square=lambda: x.square())

A spelling is one assignment of all choices. `spellings` yields them in a fixed order: first the canonical spelling and
every option of every choice *alone* (so that a missed option is seen by itself), then seeded random compositions;
each only once, where two are the same if they export to the same graph.

Every spelling is checked to be equal to its reference in float64, where casts to float32 become casts to float64: a
spelling that differs is a bug in the generator (`check_equal`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

EXPORT_SHAPE = (2, 5)
"""Batch and sequence length at export; both are dynamic."""
SECOND_SHAPE = (3, 7)
"""Another batch and sequence length, at which the exported program has to be right as well."""
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}


class Choices:
    """Named choices, each made once: fixed in advance, at random from a seed, or (without a seed) the first option."""

    def __init__(self, seed: int | None = None, fixed: dict[str, str] | None = None) -> None:
        self.seed = seed
        self.fixed = dict(fixed or {})
        self.made: dict[str, str] = {}
        self.options: dict[str, tuple[str, ...]] = {}
        self._prefix = ""

    def name(self, choice: str, *options: str) -> str:
        """The option that is taken for `choice`."""
        choice = self._prefix + choice
        if choice not in self.made:
            self.options[choice] = options
            if self.fixed.get(choice) in options:
                self.made[choice] = self.fixed[choice]
            elif self.seed is None:
                self.made[choice] = options[0]
            else:  # its own stream for every choice: a new choice elsewhere does not reshuffle this one
                self.made[choice] = random.Random(f"{self.seed}/{choice}").choice(options)
        return self.made[choice]

    def __call__(self, choice: str, /, **options: Callable[[], Any]) -> Any:
        """Calls the option that is taken."""
        return options[self.name(choice, *options)]()

    @contextmanager
    def scope(self, prefix: str) -> Iterator[None]:
        """Choices inside are made apart from those outside: ``with c.scope("k."): ...``."""
        before = self._prefix
        self._prefix = before + prefix
        try:
            yield
        finally:
            self._prefix = before

    # The spellings that every meaning shares.

    def mul(self, choice: str, a: Tensor, b: Tensor) -> Tensor:
        return self(choice, ab=lambda: a * b, ba=lambda: b * a, torch_mul=lambda: torch.mul(a, b))

    def add(self, choice: str, a: Tensor, b: Tensor) -> Tensor:
        return self(
            choice,
            ab=lambda: a + b,
            ba=lambda: b + a,
            torch_add=lambda: torch.add(a, b),
            minus_negative=lambda: a - (-b),
        )

    def sub(self, choice: str, a: Tensor, b: Tensor) -> Tensor:
        return self(
            choice,
            minus=lambda: a - b,
            plus_negative=lambda: a + (-b),
            negative_plus=lambda: -b + a,
            torch_sub=lambda: torch.sub(a, b),
            negated=lambda: -(b - a),
        )

    def scaled(self, choice: str, x: Tensor, factor: float) -> Tensor:
        """`x` times a number."""
        return self(
            choice,
            mul=lambda: x * factor,
            mul_left=lambda: factor * x,
            div=lambda: x / (1.0 / factor),
            torch_mul=lambda: torch.mul(x, factor),
        )

    def halves(self, choice: str, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The first `size` of the last dimension's ``2 * size`` entries, and the rest."""
        options: dict[str, Callable[[], Any]] = {
            "slices": lambda: (x[..., :size], x[..., size:]),
            "chunk": lambda: x.chunk(2, dim=-1),
            "split": lambda: x.split(size, dim=-1),
            "split_sizes": lambda: torch.split(x, [size, size], dim=-1),
            "tensor_split": lambda: torch.tensor_split(x, 2, dim=-1),
            "negative_slices": lambda: (x[..., :-size], x[..., -size:]),
            "narrow": lambda: (x.narrow(-1, 0, size), x.narrow(-1, size, size)),
            "unflatten_unbind": lambda: x.unflatten(-1, (2, size)).unbind(-2),
            "view_select": lambda: (
                x.reshape(*x.shape[:-1], 2, size)[..., 0, :],
                x.reshape(*x.shape[:-1], 2, size)[..., 1, :],
            ),
            "positive_dim": lambda: x.chunk(2, dim=x.ndim - 1),
        }
        return self(choice, **options)

    def evens_and_odds(self, choice: str, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Entries 0, 2, 4… and 1, 3, 5… of the last dimension."""

        def pairs() -> Tensor:
            return self(
                "pairs_view",
                unflatten=lambda: x.unflatten(-1, (size, 2)),
                reshape=lambda: x.reshape(*x.shape[:-1], -1, 2),
                reshape_exact=lambda: x.reshape(*x.shape[:-1], size, 2),
            )

        options: dict[str, Callable[[], Any]] = {
            "strided": lambda: (x[..., 0::2], x[..., 1::2]),
            "select": lambda: (pairs()[..., 0], pairs()[..., 1]),
            "unbind": lambda: pairs().unbind(-1),
            "chunk_squeeze": lambda: tuple(part.squeeze(-1) for part in pairs().chunk(2, dim=-1)),
            "split_flatten": lambda: tuple(part.flatten(-2) for part in pairs().split(1, dim=-1)),
            "transposed_chunk": lambda: tuple(part.squeeze(-2) for part in pairs().transpose(-1, -2).chunk(2, dim=-2)),
            "index_select": lambda: (
                x.index_select(-1, torch.arange(0, 2 * size, 2, device=x.device)),
                x.index_select(-1, torch.arange(1, 2 * size, 2, device=x.device)),
            ),
        }
        return self(choice, **options)

    def wide(self, choice: str, x: Tensor) -> Tensor:
        """`x` cast to float32 (in the float64 check, where everything is float64 already: to float64)."""
        if x.dtype == torch.float64:
            return x.double()
        return self(
            choice,
            float=lambda: x.float(),
            to=lambda: x.to(torch.float32),
            to_keyword=lambda: x.to(dtype=torch.float32),
            type=lambda: x.type(torch.float32),
        )

    def back(self, choice: str, x: Tensor, like: Tensor) -> Tensor:
        """`x` cast to the dtype of `like`."""
        return self(
            choice,
            to_dtype=lambda: x.to(like.dtype),
            type_as=lambda: x.type_as(like),
            to_tensor=lambda: x.to(like),
            type=lambda: x.type(like.dtype),
        )


class Model(nn.Module):
    """One meaning in a small context: a projection before, a projection after, real layouts between."""

    operator: str
    """The ONNX operator that the meaning is."""
    expected: int = 1
    """How many times the spelling applies it. Set by the subclass's ``__init__``."""
    data_inputs: tuple[str, ...] = ("x",)
    """The forward's parameters that carry activations (not masks, not positions)."""

    def __init__(self, choices: Choices, dtype: torch.dtype) -> None:
        super().__init__()
        self.c = choices
        self.dtype = dtype
        self._draws = torch.Generator().manual_seed(choices.seed or 0)

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A constant that is the same in every dtype, up to rounding."""
        return (torch.randn(*shape, generator=self._draws, dtype=torch.float64) * scale).to(self.dtype)

    def projection(self, size_in: int, size_out: int, *, bias: bool = False) -> nn.Linear:
        """A linear layer with reproducible weights."""
        layer = nn.Linear(size_in, size_out, bias=bias, dtype=self.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.draw(size_out, size_in, scale=size_in**-0.5))
            if bias:
                layer.bias.copy_(self.draw(size_out, scale=0.5))
        return layer

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        """Forward's arguments."""
        raise NotImplementedError

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The dimensions that follow batch or length; `Dim.AUTO` lets export find out which of them are one."""
        both = zip(self.inputs(*EXPORT_SHAPE), self.inputs(*SECOND_SHAPE), strict=True)
        return tuple({i: Dim.AUTO for i in range(a.ndim) if a.shape[i] != b.shape[i]} for a, b in both)

    def reference(self, *inputs: Tensor) -> Tensor:
        """What it means, said plainly."""
        raise NotImplementedError

    def leftovers(self, program: ExportedProgram) -> list[str]:
        """What a whole fusion would not have left: see `unfused`."""
        return unfused(program, self.data_inputs)


@dataclass(frozen=True)
class Spelling:
    """One way to write one meaning."""

    meaning: type[Model]
    seed: int | None
    fixed: dict[str, str] = field(default_factory=dict)

    def build(self, dtype: torch.dtype | None = None) -> Model:
        """The model, in the spelling's own dtype unless told otherwise."""
        choices = Choices(self.seed, self.fixed)
        own = choices(
            "precision",
            float32=lambda: torch.float32,
            low=lambda: choices("low", bfloat16=lambda: torch.bfloat16, float16=lambda: torch.float16),
        )
        model = self.meaning(choices, dtype or own).eval()
        with torch.no_grad():  # makes every choice, so that names and options are known
            model(*model.inputs(*EXPORT_SHAPE))
        return model

    def __str__(self) -> str:
        label = f"{self.meaning.operator} seed={self.seed}"
        return label + (f" {self.fixed}" if self.fixed else "")


def export(model: Model) -> ExportedProgram:
    """The model as a program with batch and sequence dynamic."""
    inputs = model.inputs(*EXPORT_SHAPE)
    return torch.export.export(model, inputs, dynamic_shapes=model.dynamic_shapes(), strict=False)


def check_equal(spelling: Spelling) -> None:
    """Raises AssertionError if the spelling does not compute its reference in float64, at both shapes."""
    model = spelling.build(torch.float64)
    for shape in (EXPORT_SHAPE, SECOND_SHAPE):
        inputs = model.inputs(*shape)
        with torch.no_grad():
            got, want = model(*inputs), model.reference(*inputs)
        assert got.shape == want.shape, f"{spelling}: shape {tuple(got.shape)}, reference {tuple(want.shape)}"
        worst = (got - want).abs().max().item()
        assert worst <= 1e-9 * want.abs().max().item(), f"{spelling} differs by {worst:.1e}: {model.c.made}"


def signature(program: ExportedProgram) -> tuple[Any, ...]:
    """The exported graph without names: equal for two spellings that export to the same thing."""
    number = {node: i for i, node in enumerate(program.graph.nodes)}

    def plain(value: Any) -> str:
        return repr(torch.fx.map_arg(value, lambda node: f"%{number[node]}"))

    lines = []
    for node in program.graph.nodes:
        kwargs = plain(dict(node.kwargs))
        lines.append((node.op, str(node.target), plain(node.args), kwargs))
    return tuple(lines)


def alone(meaning: type[Model]) -> Iterator[Spelling]:
    """The canonical spelling, then each option of each choice by itself (with the options that lead to it)."""
    seen: set[tuple[str, str]] = set()
    queue: list[dict[str, str]] = [{}]
    while queue:
        fixed = queue.pop(0)
        spelling = Spelling(meaning, None, fixed)
        choices = spelling.build().c
        yield spelling
        seen.update(choices.made.items())
        for choice, options in choices.options.items():
            for option in options:
                if (choice, option) not in seen:
                    seen.add((choice, option))
                    queue.append({**fixed, choice: option})


def at_random(meaning: type[Model]) -> Iterator[Spelling]:
    """Random compositions of all choices, without end."""
    seed = 0
    while True:
        yield Spelling(meaning, seed)
        seed += 1


@dataclass(frozen=True)
class Exported:
    """A spelling with its model and program."""

    spelling: Spelling
    model: Model
    program: ExportedProgram


def spellings(meaning: type[Model], count: int, *, singles: int | None = None) -> Iterator[Exported]:
    """`count` distinct spellings, always the same ones.

    `singles` limits those in which one choice stands alone (they are then taken evenly from all of them).
    """
    each = list(alone(meaning))
    if singles is not None and singles < len(each):
        each = [each[i * len(each) // singles] for i in range(singles)]
    seen: set[tuple[Any, ...]] = set()
    for tries, spelling in enumerate(itertools.chain(each, at_random(meaning))):
        if len(seen) >= count:
            return
        assert tries < 20 * count + 100, f"only {len(seen)} distinct spellings of {meaning.operator}"
        model = spelling.build()
        program = export(model)
        graph = signature(program)
        if graph not in seen:
            seen.add(graph)
            yield Exported(spelling, model, program)


# What is left of a region after fusing.

# fmt: off
LAYOUT = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "unsqueeze",
        "squeeze", "expand", "expand_as", "view_as", "clone", "contiguous", "to", "_to_copy", "type_as",
        "alias", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "select", "slice", "split",
        "split_with_sizes", "chunk", "tensor_split", "narrow", "unbind", "cat", "stack", "getitem", "detach",
        "_assert_tensor_metadata"
    }
)
"""Operators that move data and do not compute."""
CONTEXT = frozenset({"linear"})
"""What the models compute around the meaning."""
FRESH = frozenset(
    {
        "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
        "sym_size"
    }
)
# fmt: on
"""Operators that read a tensor's shape and not its values."""


def operator_name(node: torch.fx.Node) -> str:
    """``mul`` for ``aten.mul.Tensor``, ``fxfuse.rms_norm`` for an operator of ours."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, name = schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def data_nodes(program: ExportedProgram, data_inputs: tuple[str, ...]) -> list[torch.fx.Node]:
    """The calls whose value depends on the values of `data_inputs`, not merely on their shape."""
    tainted: set[torch.fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.target in data_inputs:
                tainted.add(node)
        elif (
            node.op == "call_function"
            and operator_name(node) not in FRESH
            and any(i in tainted for i in node.all_input_nodes)
        ):
            tainted.add(node)
    return [n for n in program.graph.nodes if n in tainted and n.op == "call_function"]


def unfused(program: ExportedProgram, data_inputs: tuple[str, ...], context: frozenset[str] = CONTEXT) -> list[str]:
    """Nodes that still compute with the data and are neither the context nor fused."""
    return [
        f"{node.name}: {operator_name(node)}"
        for node in data_nodes(program, data_inputs)
        if (name := operator_name(node)) not in LAYOUT | context and not name.startswith("fxfuse.")
    ]
