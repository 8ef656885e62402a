"""RMSNorm, and what is nearly one."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.adversaries.positions import factor
from tests.adversaries.program import TABLE, Body, Input, Program
from tests.adversaries.values import broken, epsilons, far, gate

DIM = 8
NOWHERE = ("nowhere", "nowhere", "nowhere", "outside", "before", "weight")
INSIDE = (
    "squared", "square", "variance", "sum", "root", "output", "gate", "two epsilons", "no epsilon", "factor", "length",
    "rolled", "rows", "slices", "table", "axis",
)  # fmt: skip


@st.composite
def norms(draw: st.DrawFn) -> Program:
    body = Body(harmless=draw(st.integers(0, 9)) < 4)
    kinds = NOWHERE if body.harmless else INSIDE
    spot = draw(st.sampled_from(kinds))
    offset = draw(st.sampled_from(["", "1 + "]))
    weight = body.parameter("weight", f"torch.rand({DIM}) + 0.5")
    body.line("S = x.shape[1]")
    if spot in ("factor", "rows", "rolled", "table"):
        body.line("i = torch.arange(S)[:, None]")
    if spot == "before":
        body.line(f"x = {draw(broken(body, 'x'))}")
    body.line("h = x" if spot != "squared" else f"h = {draw(broken(body, 'x'))}")
    epsilon = draw(st.sampled_from(["1e-6", "1e-5", "1e-8"])) if draw(st.booleans()) else draw(epsilons)
    if spot == "length":
        epsilon = f"{epsilon} * {draw(factor(body, rows=False))}"
    _root(draw, body, spot, epsilon)
    _rest(draw, body, spot, offset, weight)
    return body.program("RMSNorm", [Input("x", ("B", "S", DIM))], "y")


def _root(draw: st.DrawFn, body: Body, spot: str, epsilon: str) -> None:
    """`r`, what x is multiplied with."""
    body.line("p = " + draw(st.sampled_from(["h.pow(2)", "h * h", "h.square()", "h ** 2", "h.abs().pow(2)"])))
    if spot == "square":
        body.line(f"p = {draw(broken(body, 'p', positive=True))}")
    axes = "-1" if spot != "axis" else "(-1, -2)"
    if spot == "axis":
        body.breaks.append("the mean is over two axes")
    body.line(
        "v = "
        + draw(
            st.sampled_from(
                [f"p.mean({axes}, keepdim=True)", f"torch.mean(p, dim={axes}, keepdim=True)"]
                + ([f"p.sum(-1, keepdim=True) / {DIM}"] if axes == "-1" else [])
            )
        )
    )
    if spot == "variance":
        body.line(f"v = {draw(broken(body, 'v', positive=True))}")
    if spot == "slices":
        n = draw(far)
        body.breaks.append(f"rows from {n} on are normalised by the mean of them all")
        body.line(f"v = torch.cat([v[:, :{n}], v[:, {n}:] * 0 + v.mean(1, keepdim=True)], 1)")
    body.line("e = v" if spot == "no epsilon" else f"e = v + {epsilon}")
    if spot == "no epsilon":
        body.breaks.append(f"epsilon is on the root: {epsilon}")
    if spot == "sum":
        body.line(f"e = {draw(broken(body, 'e', positive=True))}")
    if spot in ("two epsilons", "no epsilon"):
        second = epsilon if spot == "no epsilon" else draw(epsilons)
        if spot == "two epsilons":
            body.breaks.append(f"a second epsilon of {second} on the root")
        body.line(f"r = 1 / (e.sqrt() + {second})")
    else:
        spellings = [
            "torch.rsqrt(e)",
            "e.rsqrt()",
            "1 / torch.sqrt(e)",
            "e.pow(-0.5)",
            "e ** -0.5",
            "e.sqrt().reciprocal()",
        ]
        body.line(f"r = {draw(st.sampled_from(spellings))}")
    if spot == "root":
        body.line(f"r = {draw(broken(body, 'r', positive=True))}")
    if spot == "rolled":
        kind = draw(st.sampled_from(["roll", "flip"]))
        n = draw(far)
        body.breaks.append(f"roots of other rows from length {n} on")
        body.line(f"r = r.roll(S // {n}, 1)" if kind == "roll" else f"r = torch.where(i < {n}, r, r.flip(1))")
    if spot == "factor":
        body.line(f"r = r * {draw(factor(body, rows=True))}")


def _rest(draw: st.DrawFn, body: Body, spot: str, offset: str, weight: str) -> None:
    body.line(f"y = {draw(st.sampled_from(['x * r', 'r * x', 'torch.mul(x, r)']))}")
    if spot == "output":
        body.line(f"y = {draw(broken(body, 'y'))}")
    if spot == "gate":
        source = draw(st.sampled_from(["v", "e", "r", "x.abs().amax(-1, keepdim=True)"]))
        body.line(f"g = {source}")
        body.line(f"y = y * {draw(gate(body, 'g'))}")
    if spot == "rows":
        n = draw(far)
        body.breaks.append(f"rows from {n} on are as they came")
        body.line(f"y = torch.where(i < {n}, y, x)")
    if spot == "weight":
        body.line(f"w = {weight}")
        body.line(f"w = {draw(broken(body, 'w'))}")
        weight = "w"
    if spot == "table":
        n = draw(far)
        body.breaks.append(f"other weights from position {n} on")
        rows = f"torch.where(torch.arange({TABLE})[:, None] < {n}, torch.ones({DIM}), torch.rand({DIM}))"
        weight = f"({weight} * {body.buffer('table', rows, draw(st.booleans()))}[:S])"
    body.line(f"y = {draw(st.sampled_from([f'y * ({offset}{weight})', f'({offset}{weight}) * y']))}")
    if spot == "outside":
        body.line("y = y + 0.5")
        body.line(f"y = {draw(broken(body, 'y'))}")
