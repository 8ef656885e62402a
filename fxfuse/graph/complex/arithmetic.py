"""Complex arithmetic on real and imaginary parts, as nodes of a graph.

A part is a node, a number, or None where it is 0 everywhere: the real part of `1j * a` is None, and so is the imaginary
part of whatever is real.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxfuse.graph.emit import Emitter
from fxfuse.graph.view import fake, size_text, tensor

aten = torch.ops.aten
Part = Node | float | None
Parts = tuple[Part, Part]


class NoRule(Exception):
    """What a node does to parts is not known."""


def complex_dtype(value: Any) -> torch.dtype | None:
    """The type of a complex tensor, or of a list of such; None for all else."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return first.dtype if isinstance(first, torch.Tensor) and first.dtype.is_complex else None


def is_complex(node: Node) -> bool:
    return complex_dtype(node.meta.get("val")) is not None


class Arithmetic:
    """What `node` computes, computed from the parts of what it reads; `parts` gives those of a complex node.

    Results are in the real type of the node's complex one (float32 for complex64).

    Args:
        before: put calls before this node, not right behind `node`.
    """

    def __init__(self, node: Node, parts: Callable[[Node], Parts], before: Node | None = None) -> None:
        self.node, self.emit, self._parts = node, Emitter(node, before), parts
        kinds = [complex_dtype(n.meta.get("val")) for n in (node, *node.all_input_nodes)]
        kind = next(k for k in kinds if k is not None)
        self.real = torch.empty(0, dtype=kind, device="meta").real.dtype

    def of(self, operand: Any) -> Parts:
        """The parts of an operand, real or complex, a tensor or a number."""
        if isinstance(operand, (int, float, complex)):
            number = complex(operand)
            return number.real or None, number.imag or None
        if not isinstance(operand, Node):
            raise NoRule(f"an operand {operand!r}")
        if not is_complex(operand):
            return self.cast(operand), None
        re, im = self._parts(operand)
        return self.cast(re), self.cast(im)

    def cast(self, part: Part, to: torch.dtype | None = None) -> Part:
        to = to or self.real
        if not isinstance(part, Node) or tensor(part) is None or fake(part).dtype == to:
            return part
        return self.emit.call(aten.to.dtype, part, to)

    def neg(self, a: Part) -> Part:
        return self.emit.call(aten.neg.default, a) if isinstance(a, Node) else None if a is None else -a

    def mul(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None
        if not isinstance(a, Node):
            a, b = b, a
        if not isinstance(a, Node):
            return a * b  # type: ignore[operator]
        if isinstance(b, Node) or abs(b) != 1.0:
            return self.emit.call(aten.mul.Tensor, a, b)
        return a if b == 1.0 else self.neg(a)

    def div(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None if b is not None else self._no("a division by what has no real part")
        if isinstance(a, Node):
            return self.emit.call(aten.div.Tensor, a, b)
        return self.mul(self.emit.call(aten.reciprocal.default, b), a) if isinstance(b, Node) else a / b

    def add(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return b if a is None else a
        if not isinstance(a, Node):
            a, b = b, a
        return self.emit.call(aten.add.Tensor, a, b) if isinstance(a, Node) else a + b  # type: ignore[operator]

    def sub(self, a: Part, b: Part) -> Part:
        if isinstance(a, Node) and b is not None:
            return self.emit.call(aten.sub.Tensor, a, b)
        return self.add(a, self.neg(b))

    def product(self, x: Parts, y: Parts, mul: Callable[[Part, Part], Part] | None = None) -> Parts:
        """(a + ib)(c + id); `mul` is any bilinear function."""
        (a, b), (c, d), mul = x, y, mul or self.mul
        return self.sub(mul(a, c), mul(b, d)), self.add(mul(a, d), mul(b, c))

    def quotient(self, x: Parts, y: Parts) -> Parts:
        c, d = y
        if d is None:
            return self.div(x[0], c), self.div(x[1], c)
        size = self.add(self.mul(c, c), self.mul(d, d))
        re, im = self.product(x, (c, self.neg(d)))
        return self.div(re, size), self.div(im, size)

    def turned(self, size: Part, angle: Part) -> Parts:
        """size · (cos, sin) of the angle."""
        if not isinstance(angle, Node):
            return (size, None) if angle is None else self._no("an angle that is a number")
        cos, sin = (self.emit.call(f, angle) for f in (aten.cos.default, aten.sin.default))
        return self.mul(cos, size), self.mul(sin, size)

    def exp(self, x: Parts) -> Parts:
        if not (x[0] is None or isinstance(x[0], Node)):
            raise NoRule("a real part that is a number")
        return self.turned(1.0 if x[0] is None else self.emit.call(aten.exp.default, x[0]), x[1])

    def magnitude(self, x: Parts) -> Node:
        a, b = self.filled(x)
        if x[1] is None:
            return self.emit.call(aten.abs.default, a)
        return self.emit.call(aten.sqrt.default, self.add(self.mul(a, a), self.mul(b, b)))

    def filled(self, parts: Parts) -> tuple[Node, Node]:
        """Both parts as tensors."""
        like = next((p for p in parts if isinstance(p, Node)), None)
        if like is None:
            raise NoRule("a complex number that no tensor gives a shape")

        def full(part: Any) -> Node:
            # Contiguous, for to keep the layout torch asks whether a size is 1, which would be a guard.
            number = 0.0 if part is None else part
            return self.emit.call(aten.full_like.default, like, number, memory_format=torch.contiguous_format)

        re, im = (p if isinstance(p, Node) else full(p) for p in parts)
        return re, im

    def joined(self, parts: Parts) -> Node:
        """A real tensor ``[..., 2]``, as `view_as_real` has it."""
        return self.emit.call(aten.stack.default, list(self.filled(parts)), -1)

    def widened(self, parts: Parts) -> Parts:
        """Parts of the node's shape, where one came out narrower: `re` of one operand and `im` of another."""
        wanted = [size_text(s) for s in fake(self.node).shape]
        every = [p for i in self.node.all_input_nodes if tensor(i) is not None for p in self.of(i)]
        operands = [p for p in every if isinstance(p, Node)]

        def wide(part: Part) -> Part:
            if not isinstance(part, Node) or [size_text(s) for s in fake(part).shape] == wanted:
                return part
            alike = self.emit.call(aten.broadcast_tensors.default, [part, *operands])
            return self.emit.call(operator.getitem, alike, 0)

        return wide(parts[0]), wide(parts[1])

    def _no(self, what: str) -> Any:
        raise NoRule(what)
