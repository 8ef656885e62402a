"""Attention sinks written beside flex_attention: y · sigmoid(lse - sink) is a softmax with one more score.

exp(s) / (exp(lse) + exp(sink)) = softmax(s) · exp(lse) / (exp(lse) + exp(sink)). So does transformers' GPT-OSS, whose
log-sum-exp of (lse, sink) is the same function; what is written there is measured, not matched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.graph.region import Region, real_users
from fxfuse.graph.view import ARITHMETIC, CAST, LAYOUT, NO_OP, GraphView, fake, is_pure, op_name, tensor
from fxfuse.patterns.flex_attention.calls import OUTPUTS, Flex, flex
from fxfuse.patterns.flex_attention.encoding import encode
from fxfuse.patterns.flex_attention.forms import attention_form
from fxfuse.patterns.flex_attention.reading import ULP, problem_of, region_of
from fxfuse.patterns.flex_attention.score import Opaque, read_score
from fxfuse.proof.evaluate import draw, generator
from fxfuse.recognise.answers import Found, Reason
from fxfuse.recognise.probe import Probe

_EXPONENTIAL = frozenset(["exp", "exp2", "expm1", "log", "log1p", "log2", "logsumexp", "logaddexp", "logaddexp2"])
_TO_SHARE = frozenset(["sigmoid", "log_sigmoid", "softplus", "softmax", "reciprocal", "sum", "amax", "maximum"])
_GUARDS = frozenset(["where", "masked_fill", "eq", "ne", "isinf", "isneginf", "isfinite", "zeros_like", "full_like"])
_FROM_LSE = LAYOUT | CAST | ARITHMETIC | NO_OP | _EXPONENTIAL | _TO_SHARE | _GUARDS
_FROM_OUTPUT = LAYOUT | CAST | NO_OP | {"mul", "div", "true_divide"}
_LIMIT = 64
_HEADS_FIRST: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: _padded(t, 3).unsqueeze(-1),
    lambda t: _padded(t, 4),
    lambda t: _padded(t, 3).transpose(1, 2).unsqueeze(-1),
    lambda t: _padded(t, 4).transpose(1, 2),
)
"""To [B, H, S, 1], from what broadcasts against [B, H, S], [B, H, S, 1], [B, S, H] or [B, S, H, 1]."""


@dataclass(frozen=True)
class Sinks:
    """A score for each row that takes part in the softmax and has no key and no value."""

    position: int | None
    """Of the tensor in `Region.inputs`; None where it is a number."""
    spread: Callable[[Tensor], Tensor] | None = None
    """That tensor as [1 or B, 1 or H, 1 or S, 1]."""
    number: float = 0.0
    over: str = "[1, 1, 1, 1]"
    """Which sizes it varies over, for the report."""

    def column(self, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.position is None or self.spread is None:
            return torch.full((1, 1, 1, 1), self.number, dtype=inputs[0].dtype, device=inputs[0].device)
        return self.spread(inputs[self.position])


def regions_with_sinks(view: GraphView) -> Iterator[tuple[Flex, Region]]:
    """Both outputs of one call, to where they meet, if nothing else reads what is computed between."""
    taken: dict[Node, list[tuple[Flex, str, Node]]] = {}
    for node in view.nodes:
        if (call := flex(node)) is not None:
            for name, output in call.used.items():
                taken.setdefault(call.query, []).append((call, name, output))
    for outputs in taken.values():
        for call, name, y in outputs:
            for other, other_name, lse in outputs:
                same = call.node.args == other.node.args and call.node.kwargs == other.node.kwargs
                if same and (name, other_name) == ("output", "logsumexp"):
                    region = _region(view, call, y, lse)
                    if region is not None:
                        yield call, region


def _region(view: GraphView, call: Flex, y: Node, lse: Node) -> Region | None:
    from_y, from_lse = _reached(y, _FROM_OUTPUT), _reached(lse, _FROM_LSE)
    both = from_y & from_lse
    if not both:
        return None
    output = min(both, key=view.order.__getitem__)
    calls = {n for taken in (y, lse) for n in taken.all_input_nodes}
    nodes, others = {y, lse, *calls}, list[Node]()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        if node in from_y or node in from_lse or (op_name(node) in ("expand", "broadcast_to") and is_pure(node)):
            nodes.add(node)
            stack.extend(node.all_input_nodes)
        elif tensor(node) is not None:
            others.append(view.canonical(node))
    if str(fake(output).shape) != str(fake(y).shape) or _read_beside(nodes - {output}, nodes, from_y | from_lse):
        return None
    plain = region_of(view, call, y)
    ordered = view.sorted(nodes)
    others = [n for n in dict.fromkeys([*plain.others, *others]) if n not in plain.sources]
    if view.mutations and view.mutated_between(
        [*plain.sources, *others, *ordered], view.order[ordered[0]], view.order[output]
    ):
        return None
    # A size that is written down (an expanded sink) holds for the whole length alone.
    limits = () if any(op_name(n) in ("expand", "broadcast_to") for n in ordered) else plain.source_limits
    return replace(plain, output=output, others=tuple(others), nodes=tuple(ordered), source_limits=limits)


def _read_beside(inner: set[Node], nodes: set[Node], computed: set[Node]) -> bool:
    """Does anything else need the call, its outputs, or what is computed from them?"""
    calls = {n for n in inner if flex(n) or any(map(flex, n.all_input_nodes))}
    users = (u for n in inner & (computed | calls) for u in real_users(n))
    return any(u not in nodes and (u.users or u.op == "output") for u in users)


def _reached(start: Node, allowed: frozenset[str]) -> set[Node]:
    """What is computed from a node, through these operators."""
    found: set[Node] = set()
    stack = [start]
    while stack and len(found) < _LIMIT:
        for user in stack.pop().users:
            if user not in found and op_name(user) in allowed and is_pure(user) and tensor(user) is not None:
                found.add(user)
                stack.append(user)
    return found


def takes(region: Region, output: str) -> Node:
    """The node of the region that takes this output of the call."""
    return next(n for n in region.nodes for i in n.all_input_nodes if flex(i) and n.args[1] == OUTPUTS.index(output))


def measure_sinks(region: Region, ask: Probe) -> Sinks | Reason:
    """Solve output = y · sigmoid(lse - sink) for the sink, y and lse drawn; which tensor is it?"""
    y, lse = takes(region, "output"), takes(region, "logsumexp")
    arithmetic = [n for n in region.nodes if flex(n) is None and n not in (y, lse)]
    read = {region.view.canonical(i) for n in arithmetic for i in n.all_input_nodes}
    places = [i for i, n in enumerate(region.inputs) if n in read]
    if len(places) > 1:
        return Reason("flex_attention whose output meets its log-sum-exp and several tensors")
    evaluator = ask.evaluator(0, equal_sizes=region.equal_sizes)
    nodes = [region.inputs[i] for i in places]
    values = ask.draws(nodes, evaluator, 61)
    sinks = []
    for seed in (62, 63):
        gen = generator(seed)
        env = {y: draw(y, evaluator, gen), lse: draw(lse, evaluator, gen, scale=2.0)}
        result = evaluator.run(arithmetic, env | dict(zip(nodes, values, strict=True)))[region.output]
        share = result / env[y]
        if not torch.allclose(share, share[..., :1]) or not ((share > 0) & (share < 1)).all():
            return Reason("flex_attention whose output is not just given a smaller share for each row")
        share = share.mean(-1)
        # The call gives its log-sum-exp in units of log 2.
        sinks.append(env[lse] * math.log(2) - (share / (1 - share)).log())
    sink = sinks[0].unsqueeze(-1)
    if not torch.allclose(sinks[0], sinks[1], rtol=1e-7, atol=1e-7):
        return Reason("flex_attention whose output is multiplied with no share of one more score")
    if not places:
        number = float(sink.mean())
        number = round(number) if abs(number - round(number)) < 1e-9 else number
        return Sinks(None, number=float(number))
    for spread in _HEADS_FIRST:
        if values[0].dim() <= 4 and _broadcasts(spread, values[0], sink):
            named = zip("BHS1", spread(values[0]).shape, strict=True)
            return Sinks(places[0], spread, over="[" + ", ".join("1" if n == 1 else name for name, n in named) + "]")
    return Reason("flex_attention with sinks that are computed from a tensor in a way that is not known")


def _broadcasts(spread: Callable[[Tensor], Tensor], value: Tensor, sink: Tensor) -> bool:
    try:
        return torch.allclose(spread(value).expand(sink.shape), sink, rtol=1e-7, atol=1e-7)
    except (RuntimeError, IndexError):
        return False


def _padded(t: Tensor, dims: int) -> Tensor:
    """Axes of size one in front, and none taken away."""
    if t.dim() > dims:
        raise IndexError(f"{t.dim()} axes, not {dims}")
    while t.dim() < dims:
        t = t.unsqueeze(0)
    return t


def read_with_sinks(region: Region, ask: Probe) -> Found | Reason:
    """One Attention with one more key, where the mods and the sinks allow it."""
    problem = problem_of(region, ask)
    if isinstance(problem, Reason):
        return problem
    score = read_score(problem.score)
    encoding = score if isinstance(score, Opaque) else encode(score, problem.mask, problem.call.scale)
    if isinstance(encoding, Opaque):
        return Reason(f"flex_attention with sinks, but {encoding.reason}")
    sinks = measure_sinks(region, ask)
    if isinstance(sinks, Reason):
        return sinks
    encoding = encoding.with_mask
    what = f"{sinks.number:g}" if sinks.position is None else sinks.over
    form = attention_form(problem, encoding, sinks.column)
    return Found(
        "Attention",
        {**encoding.parts, "sinks": what},
        (form,),
        ulp=ULP,
        averaging=True,
        from_leaves=problem.from_leaves,
        read=True,
    )
