"""What the arithmetic of an exported program may lose, element by element, and what it computes in float64.

An interpreter of the graph runs it again with noise, as Monte Carlo arithmetic does: what a node adds up, multiplies
or raises is off by a few units in the last place before it is used, each element by its own random amount. Cancelled
sums, roots of tiny numbers and exponentials of large ones then show in the result what they show in any order of
evaluation. Only what depends on the values of the inputs is noisy or widened: tables, masks and positions are computed
by the same nodes before and after a fusion, so they have no error to allow for.

Three kinds of node have rules of their own:

- Nodes that move or select elements round nothing: no noise. So rows that are filled with one number stay exactly even.
- Softmax takes the maximum off first: its input is off by units of that difference, not of the scores. The rounding
  of the scores themselves is in the nodes before it.
- Casts to coarser types and comparisons jump. What they read is kept in the runs with noise, which says how far off
  it may be; in two further runs all of it is pushed up, and down, by so much. An element near a jump is then seen on
  both sides of it, never missed by chance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

UNITS = 4.0
"""How far off what a node reads is, in units of rounding (half the last place)."""
Jumps = dict[tuple[Node, Node], Tensor]
"""What a node that jumps reads of another."""
# fmt: off
EXACT = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze",
        "expand", "expand_as", "clone", "contiguous", "alias", "select", "slice", "split", "split_with_sizes", "chunk",
        "unbind", "cat", "concat", "stack", "getitem", "detach", "narrow", "roll", "flip", "repeat_interleave",
        "index", "index_select", "index_copy", "index_put", "slice_scatter", "gather", "tril", "triu", "where",
        "masked_fill", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "relu", "hardtanh", "relu6",
        "threshold", "hardshrink", "abs", "neg", "amax", "amin", "max", "min", "nan_to_num", "zeros_like", "ones_like",
        "full_like", "repeat", "tile", "copy", "T", "mT", "movedim",
    }
)
JUMPS = frozenset(
    {"gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "floor", "ceil", "round", "trunc", "sign", "topk", "argmax"}
)
# fmt: on
FINE = (torch.float32, torch.float64)
CASTS = frozenset({"to", "_to_copy", "type_as", "type"})


def name_of(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))


def flat(outputs: Any) -> list[Tensor]:
    """The tensors that a program gives."""
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]


class Rerun(Interpreter):
    """Runs a graph again: with noise, or in float64, or only watched.

    Args:
        module: the exported program's own module.
        wide: what depends on the inputs' values is computed in float64; casts to coarser types stay casts.
        noise: seed of the noise; None: there is none.
        pushes: what is added to what jumps.
    """

    def __init__(
        self, module: GraphModule, *, wide: bool = False, noise: int | None = None, pushes: Jumps | None = None
    ) -> None:
        super().__init__(module)
        self.wide, self.noise = wide, noise is not None
        self.draws = torch.Generator().manual_seed(noise or 0)
        self.pushes = pushes
        self.jumps: Jumps = {}
        self.overflows = False
        """Was something too large for its type? Then eager's answer is none."""
        self.noisy: set[Node] = set()

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            result = self.run(*inputs)
        return flat(result)

    def run_node(self, n: Node) -> Any:
        if n.op == "placeholder":
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                self.noisy.add(n)
                value = value.double() if self.wide else value
            return value
        value = n.meta.get("val")
        made = isinstance(value, (Tensor, list, tuple)) or value is None
        if n.op != "call_function" or not (made and self._depends(n)):
            return super().run_node(n)
        if name_of(n) == "_assert_tensor_metadata":  # of the types that the program had
            return None
        self.noisy.add(n)
        args, kwargs = map_arg((n.args, n.kwargs), lambda node: self._read(n, node))
        if self.wide:
            args, kwargs = tree_map(_widened, (args, kwargs))
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        if not self.noise and not self.wide and isinstance(result, Tensor) and result.is_floating_point():
            too_large = result.isinf() if name_of(n) in CASTS else result == torch.inf
            before = args[0] if name_of(n) in CASTS else None
            if isinstance(before, Tensor) and before.shape == result.shape:
                too_large &= before.isfinite()
            self.overflows |= bool(too_large.any())
        return result

    def _depends(self, n: Node) -> bool:
        return any(i in self.noisy for i in n.all_input_nodes)

    def _read(self, reader: Node, node: Node) -> Any:
        """What `reader` sees of `node`."""
        value = self.env[node]
        if node not in self.noisy or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        name = name_of(reader)
        if name in JUMPS or (name in CASTS and reader.meta["val"].dtype not in FINE):
            self.jumps[reader, node] = value
            return value if self.pushes is None else value + self.pushes[reader, node]
        if not self.noise or name in EXACT or name in CASTS:
            return value
        unit = torch.finfo(value.dtype).eps / 2
        noise = torch.rand(value.shape, generator=self.draws, dtype=value.dtype).mul_(2).sub_(1).mul_(UNITS * unit)
        if name in ("softmax", "_softmax", "log_softmax", "logsumexp"):
            top = value.amax(-1, keepdim=True)
            return top + (value - top) * (1 + noise)
        if name == "scaled_dot_product_attention" and node not in reader.args[:3]:
            return value
        return value * (1 + noise)


def _widened(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return value
