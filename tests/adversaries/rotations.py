"""Rotary embeddings, and what is nearly one."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.adversaries.positions import factor, filled
from tests.adversaries.program import TABLE, Body, Input, Program
from tests.adversaries.values import broken, far

DIM, ROTARY = 8, 4
OTHERS = (
    "{p}.clamp(max={n})", "torch.minimum({p}, torch.tensor({n}.0))",
    "torch.where({p} < {n}, {p}, {n} + ({p} - {n}) / 4)",
    "{p}.bfloat16().float()", "{p}.long().to(torch.int8).float()", "{p} % {n}", "{p} - torch.floor({p} / {n}) * {n}",
    "({p} * (1 / {n})).floor() * {m} + {p}", "{p} + F.relu({p} - {n})", "{p} + ({p} >= {n}) * 1.0",
    "{p} * (1 + S // {n})",
    "(2 * {p}).half().float() / 2", "{p}.long().bitwise_and(127).float()",
)  # fmt: skip
"""Positions that are the plain ones near the start only."""
NOWHERE = ("nowhere", "nowhere", "both tables", "outside", "before")
INSIDE = (
    "half of the angles",
    "half of a table",
    "cos alone",
    "turned",
    "passed",
    "sign",
    "shifted",
    "factor",
    "buffer",
)


@st.composite
def rotations(draw: st.DrawFn) -> Program:
    body = Body(harmless=draw(st.integers(0, 9)) < 4)
    kinds = NOWHERE if body.harmless else INSIDE
    spot = draw(st.sampled_from(kinds))
    partial = spot == "passed" or draw(st.integers(0, 3)) == 0
    size = ROTARY if partial else DIM
    inputs = [Input("x", ("B", 2, "S", DIM))]
    body.line("S = x.shape[2]")
    if draw(st.booleans()):
        inputs.append(Input("ids", ("B", "S"), "positions"))
        body.line("p = ids[:, None, :, None].float()")
    else:
        body.line("p = torch.arange(S).float()[:, None]")
    frequencies = f"100.0 ** (-torch.arange(0, {size}, 2) / {size})"
    body.line(f"inv = {body.buffer('inv', frequencies, False) if draw(st.booleans()) else frequencies}")
    _tables(draw, body, spot, size)
    if spot == "before":
        body.line(f"x = {draw(broken(body, 'x'))}")
    body.line("a = x" if not partial else f"a, rest = x[..., :{size}], x[..., {size}:]")
    _turned(draw, body, spot, size)
    if partial:
        if spot == "passed":
            body.line(f"rest = {draw(broken(body, 'rest'))}")
        body.line("y = torch.cat([y, rest], -1)")
    if spot == "outside":
        body.line("y = y + 0.5")
        body.line(f"y = {draw(broken(body, 'y'))}")
    return body.program("RotaryEmbedding", inputs, "y")


def _tables(draw: st.DrawFn, body: Body, spot: str, size: int) -> None:
    """`cos` and `sin`, of one position and feature each."""
    other = draw(filled(draw(st.sampled_from(OTHERS)))).replace("{p}", "p")
    if spot in ("both tables", "half of the angles", "half of a table"):
        body.breaks.append(f"positions {other} in {spot}")
    if spot == "both tables":
        body.line(f"p = {other}")
    body.line("f = p * inv")
    if spot in ("half of the angles", "half of a table"):
        body.line(f"g = ({other}) * inv")
    elif spot == "buffer":
        n = draw(far)
        body.breaks.append(f"half of the angles are from a buffer, other ones from {n} on")
        angles = f"torch.where(torch.arange({TABLE}.0)[:, None] < {n}, 1.0, 0.5) * torch.arange({TABLE}.0)[:, None]"
        frequencies = f"100.0 ** (-torch.arange(0, {size}, 2) / {size})"
        body.line(f"g = {body.buffer('angles', f'{angles} * {frequencies}', draw(st.booleans()))}[p[..., 0].long()]")
    else:
        body.line("g = f")
    if spot == "half of a table":
        body.line("cos, sin = torch.cat([f, f], -1).cos(), torch.cat([f, g], -1).sin()")
    elif draw(st.booleans()):
        body.line("f = torch.cat([f, g], -1)")
        body.line("cos, sin = f.cos(), f.sin()")
    else:
        body.line("cos, sin = torch.cat([f.cos(), g.cos()], -1), torch.cat([f.sin(), g.sin()], -1)")
    if spot == "factor":
        body.line("i = torch.arange(S)[:, None]")
        scale = draw(factor(body, rows=True))
        half = f"torch.cat([sin[..., :{size // 2}], sin[..., {size // 2}:] * {scale}], -1)"
        body.line(draw(st.sampled_from([f"cos = cos * {scale}", f"sin = {half}"])))
    if spot == "cos alone":
        body.line(f"cos = {draw(broken(body, 'cos'))}")
    if spot == "sign":
        n = draw(far)
        body.breaks.append(f"one half turns the other way from {n} on")
        body.line(f"turn = torch.where(p < {n}, 1.0, -1.0)")
        body.line(f"sin = torch.cat([sin[..., :{size // 2}], sin[..., {size // 2}:] * turn], -1)")


def _turned(draw: st.DrawFn, body: Body, spot: str, size: int) -> None:
    """`y`, from `a`."""
    half = size // 2
    spellings = [
        f"torch.cat([-b[..., {half}:], b[..., :{half}]], -1)",
        "torch.cat([-b.chunk(2, -1)[1], b.chunk(2, -1)[0]], -1)",
        f"torch.cat([-b.narrow(-1, {half}, {half}), b.narrow(-1, 0, {half})], -1)",
        f"b.roll({half}, -1) * torch.tensor([-1.0] * {half} + [1.0] * {half})",
    ]
    body.line(f"b = {draw(broken(body, 'a')) if spot == 'turned' else 'a'}")
    body.line(f"b = {draw(st.sampled_from(spellings))}")
    if spot == "shifted":
        n = draw(far)
        shifts = [f"b.roll(S // {n}, 2)", f"torch.cat([b[:, :, :{n}], b[:, :, {n}:].flip(2)], 2)"]
        body.breaks.append(f"positions are mixed from {n} on")
        body.line(f"b = {draw(st.sampled_from(shifts))}")
    body.line(f"y = {draw(st.sampled_from(['a * cos + b * sin', 'b * sin + a * cos', 'torch.add(a * cos, b * sin)']))}")
