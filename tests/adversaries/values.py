"""Breaks of values: bounds, thresholds, casts and gates that begin between a thousandth and a hundred million.

Each strategy takes the name of a value and gives an expression of it; most are the value itself near 1.
"""

from __future__ import annotations

from hypothesis import strategies as st

from tests.adversaries.program import Body

# fmt: off
CLIPS = (
    "{v}.clamp(-{c}, {c})", "{v}.clamp(max={c})", "{v}.clamp(min=-{c})", "torch.clamp({v}, min=-{c}, max={c})",
    "torch.minimum({v}, torch.tensor({c}))", "torch.minimum({v}, {v} * 0 + {c})",
    "torch.maximum({v}, torch.full_like({v}, -{c}))", "torch.where({v} > {c}, {c}, {v})",
    "torch.where({v}.abs() < {c}, {v}, {v}.sign() * {c})", "torch.where({v}.abs() > {c}, 0.0, {v})",
    "{v}.masked_fill({v} > {c}, {c})", "{v}.masked_fill({v}.abs() >= {c}, 0.0)", "F.hardtanh({v}, -{c}, {c})",
    "{v} - F.relu({v} - {c})", "{v} * ({v}.abs() < {c})", "{v} * ({v} > -{c}).float()",
    "{c} * F.hardtanh({v} / {c})", "{c} * torch.tanh({v} / {c})", "{v} / (1 + ({v} / {c}).pow(2)).sqrt()",
    "torch.where({v}.abs() < {c}, {v}, {v} / 2)", "{v} + 0.5 * F.relu({v} - {c})", "-F.threshold(-{v}, -{c}, -{c})",
    "torch.where({v} >= {c}, {c} + torch.log1p(({v} - {c}).clamp(min=0)), {v})",
)
"""Where a value is large, whatever its sign."""
CAPS = (
    "{v}.clamp(max={c})", "torch.minimum({v}, torch.tensor({c}))", "F.relu6({v} * (6 / {c})) * ({c} / 6)",
    "F.hardtanh({v}, 0.0, {c})", "torch.where({v} < {c}, {v}, {c})", "{v} - F.relu({v} - {c})",
    "{v}.masked_fill({v} > {c}, {c})",
)
"""Where a value that is never negative is large."""
FLOORS = (
    "{v}.clamp(min={e})", "torch.maximum({v}, torch.tensor({e}))", "F.relu({v} - {e}) + {e}",
    "F.threshold({v}, {e}, {e})", "torch.where({v} < {e}, {e}, {v})", "{v} + {e}",
)
"""Where a value that is never negative is small."""
HOLES = (
    "torch.where({v}.abs() < {e}, 0.0, {v})", "F.hardshrink({v}, {e})", "{v} * ({v}.abs() > {e})",
    "{v}.masked_fill({v}.abs() <= {e}, 0.0)",
)
"""Where a value is small."""
CASTS = (
    "{v}.bfloat16().float()", "{v}.half().float()", "{v}.to(torch.bfloat16).to({v}.dtype)",
    "{v}.to(torch.float16).type_as({v})", "({v} * 4096).round() / 4096",
)
# fmt: on
GATES = (
    "torch.sigmoid(30 - {v}.abs() / {c})",
    "(2 - {v}.abs() / {c}).clamp(0.0, 1.0)",
    "(1 - F.relu({v}.abs() - {c}) / {c}).clamp(min=0)",
    "torch.where({v}.abs() < {c}, 1.0, 0.5)",
    "(torch.tanh(20 - {v}.abs() / {c}) * 0.5 + 0.5)",
)
"""Factors that are 1 until a value is far out."""


def number(value: float) -> str:
    return f"{value:.1e}"


bounds = st.integers(-30, 80).map(lambda n: number(10 ** (n / 10)))
"""From 1e-3 to 1e8, log-uniform."""
epsilons = st.integers(-140, -10).map(lambda n: number(10 ** (n / 10)))
"""From 1e-14 to 0.1, log-uniform."""
far = st.integers(16, 280)
"""A position or a length beyond those that are tried first, within those that are run."""


@st.composite
def bound_in(draw: st.DrawFn, body: Body, spelling: str) -> str:
    """A bound: mostly a number, at times a buffer where the spelling takes a tensor."""
    value = draw(bounds)
    if "torch.tensor({c})" in spelling and draw(st.booleans()):
        return body.buffer("bound", f"torch.tensor({value})", draw(st.booleans()))
    return value


@st.composite
def broken(draw: st.DrawFn, body: Body, value: str, *, positive: bool = False, heads: int = 0) -> str:
    """An expression that is `value` for some values of it only.

    Args:
        body: takes the buffers, and what was broken.
        value: a name.
        positive: it is never negative.
        heads: the size of its second axis of four, if the bound may be one per head; 0: it may not.
    """
    if heads > 1 and draw(st.integers(0, 5)) == 0:
        bound = draw(bounds)
        sizes = ", ".join([bound, *["1e30"] * (heads - 1)])
        name = body.buffer("bounds", f"torch.tensor([{sizes}])[:, None, None]", draw(st.booleans()))
        body.breaks.append(f"{value} is bounded by {bound} in one head")
        return draw(
            st.sampled_from([f"torch.minimum({value}, {name})", f"torch.where({value} < {name}, {value}, 0.0)"])
        )
    kinds = (CAPS, FLOORS, CASTS) if positive else (CLIPS, CLIPS, HOLES, CASTS)
    spelling = draw(st.sampled_from(draw(st.sampled_from(kinds))))
    bound = draw(bound_in(body, spelling)) if "{c}" in spelling else ""
    small = draw(epsilons) if "{e}" in spelling else ""
    text = spelling.replace("torch.tensor({c})", "{c}") if bound.startswith("self.") else spelling
    expression = text.format(v=value, c=bound, e=small)
    body.breaks.append(f"{value} = {expression}")
    return expression


@st.composite
def gate(draw: st.DrawFn, body: Body, value: str) -> str:
    """A factor that is 1 until `value` is far out."""
    expression = draw(st.sampled_from(GATES)).format(v=value, c=draw(bounds))
    body.breaks.append(f"a gate {expression}")
    return expression
