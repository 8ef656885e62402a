"""Patterns by example as users write them, and what is nearly one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tests.adversaries.positions import factor
from tests.adversaries.program import Body, Input, Program
from tests.adversaries.values import FLOORS, broken, epsilons, far, gate

DIM = 8


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def rectified(x: Tensor) -> Tensor:
    return F.relu(x)


def unit_length(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return x * (x.pow(2).sum(-1, keepdim=True) + epsilon).rsqrt()


def soft_cap(x: Tensor, cap: float = 30.0) -> Tensor:
    return cap * torch.tanh(x / cap)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def unsigned_nibbles(p: Tensor, s: Tensor) -> Tensor:
    return torch.stack([p & 15, (p >> 4) & 15], -1).flatten(-2) * s


def signed_nibbles(p: Tensor, s: Tensor) -> Tensor:
    return torch.stack([((p & 15) ^ 8) - 8, p >> 4], -1).flatten(-2) * s


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (swiglu, rectified, unit_length, soft_cap, centred, unsigned_nibbles, signed_nibbles)
}
# fmt: off
SILU = ("F.silu(g)", "g * torch.sigmoid(g)", "g * g.sigmoid()", "g / (1 + torch.exp(-g))",
        "0.5 * g * (1 + torch.tanh(g / 2))")
RECTIFIED = ("F.relu(x)", "x.clamp(min=0)", "torch.maximum(x, torch.zeros(()))", "torch.where(x > 0, x, 0.0)",
             "(x + x.abs()) / 2")
BENT = (
    "F.relu6(x)", "F.hardtanh(x, 0.0, {c})", "torch.where(x > {c}, {c}, F.relu(x))", "F.relu(x) - F.relu(x - {c})",
    "F.leaky_relu(x, {e})", "F.threshold(x, {e}, 0.0)", "F.relu(x - {e})", "F.relu(x).clamp(max={c})",
    "torch.where(x > -{c}, F.relu(x), x)", "F.relu(x) * (x < {c})",
)
LOW = ("p & 15", "p % 16", "p.remainder(16)", "p - (p >> 4 << 4)", "torch.bitwise_and(p, 15)")
HIGH = ("(p >> 4) & 15", "(p >> 4) % 16", "(p & -16) // 16 % 16")
SIGNED_LOW = ("((p & 15) ^ 8) - 8", "(p << 4) >> 4", "torch.where((p & 15) > 7, (p & 15) - 16, p & 15)",
              "(p + 8) % 16 - 8")
SIGNED_HIGH = ("p >> 4", "(p - (p & 15)) // 16", "torch.div(p, 16, rounding_mode='floor')")
WRONG = ("p & 7", "p.abs() & 15", "torch.where(p > {m}, p & 15, p & 7)", "(p & 15).clamp(max={k})", "p >> 5", "p // 16",
         "torch.div(p, 16, rounding_mode='trunc')", "p.clamp(min=-{m}) & 15", "(p & 15) - (p < -{m}).to(torch.int8)")
# fmt: on


@st.composite
def examples(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    body = Body(harmless=draw(st.integers(0, 9)) < 4)
    nowhere = body.harmless
    if "nibbles" in name:
        return _nibbles(draw, body, name, nowhere)
    inputs = [Input(n, ("B", "S", DIM)) for n in ("gu" if name == "swiglu" else "x")]
    body.line(f"S = {inputs[0].name}.shape[1]")
    {
        "swiglu": _swiglu,
        "rectified": _rectified,
        "unit_length": _unit_length,
        "soft_cap": _soft_cap,
        "centred": _centred,
    }[name](draw, body, nowhere)
    if nowhere and draw(st.booleans()):
        body.line("y = y + 0.25")
        body.line(f"y = {draw(broken(body, 'y'))}")
    return body.program("example", inputs, "y", pattern=name)


def _swiglu(draw: st.DrawFn, body: Body, nowhere: bool) -> None:
    spot = "" if nowhere else draw(st.sampled_from(["g", "u", "h", "gate", "factor", "sigmoid"]))
    silu = draw(st.sampled_from(SILU))
    if spot in ("g", "u"):
        # The value goes two ways, so that the break lies inside.
        body.line(f"a = {draw(broken(body, spot))}")
        silu = silu if spot == "u" else f"a * torch.sigmoid({draw(st.sampled_from(['a', 'g']))})"
    body.line(f"h = {silu}")
    if spot == "sigmoid":
        body.line("z = g.sigmoid()")
        body.line(f"h = g * {draw(broken(body, 'z', positive=True))}")
    if spot == "h":
        body.line(f"h = {draw(broken(body, 'h'))}")
    if spot == "gate":
        body.line(f"h = h * {draw(gate(body, draw(st.sampled_from('gu'))))}")
    if spot == "factor":
        body.line("i = torch.arange(S)[:, None]")
        body.line(f"h = h * {draw(factor(body, rows=True))}")
    body.line(f"y = h * {'a' if spot == 'u' else 'u'}")


def _rectified(draw: st.DrawFn, body: Body, nowhere: bool) -> None:
    if nowhere:
        body.line(f"y = {draw(st.sampled_from(RECTIFIED))}")
        return
    number = f"{10 ** draw(st.floats(-3, 8)):.1e}"
    spelling = draw(st.sampled_from(BENT)).format(c=number, e=draw(epsilons))
    body.breaks.append(f"bent otherwise: {spelling}")
    body.line(f"y = {spelling}")


def _unit_length(draw: st.DrawFn, body: Body, nowhere: bool) -> None:
    spot = "" if nowhere else draw(st.sampled_from(["epsilon", "n", "r", "floor", "gate", "factor"]))
    epsilon = draw(epsilons)
    body.line("n = x.pow(2).sum(-1, keepdim=True)")
    if spot == "n":
        body.line(f"n = {draw(broken(body, 'n', positive=True))}")
    if spot == "floor":
        text = draw(st.sampled_from(FLOORS)).format(v="n", e=epsilon)
        body.breaks.append(f"the epsilon is {text}")
        body.line(f"r = torch.rsqrt({text})")
    elif spot == "epsilon":
        text = draw(
            st.sampled_from(["1 / (n.sqrt() + {e})", "1 / n.sqrt().clamp(min={e})", "1 / (torch.sqrt(n + {e}) + {e})"])
        )
        body.breaks.append("the epsilon is on the root")
        body.line(f"r = {text.format(e=epsilon)}")
    else:
        text = draw(st.sampled_from(["torch.rsqrt(n + {e})", "(n + {e}) ** -0.5", "1 / (n + {e}).sqrt()"]))
        body.line(f"r = {text.format(e=epsilon)}")
    if spot == "r":
        body.line(f"r = {draw(broken(body, 'r', positive=True))}")
    if spot == "gate":
        body.line(f"r = r * {draw(gate(body, 'n'))}")
    if spot == "factor":
        body.line("i = torch.arange(S)[:, None]")
        body.line(f"r = r * {draw(factor(body, rows=True))}")
    body.line("y = x * r")


def _soft_cap(draw: st.DrawFn, body: Body, nowhere: bool) -> None:
    cap = f"{10 ** draw(st.floats(-1, 6)):.1e}"
    spot = "" if nowhere else draw(st.sampled_from(["inside", "t", "hard"]))
    body.line(f"t = x / {cap}")
    if spot == "inside":
        body.line(f"t = {draw(broken(body, 't'))}")
    body.line("t = torch.tanh(t)" if spot != "hard" else "t = t / (1 + t.pow(2)).sqrt()")
    if spot == "hard":
        body.breaks.append("another curve")
    if spot == "t":
        body.line(f"t = {draw(broken(body, 't'))}")
    body.line(f"y = {cap} * t")


def _centred(draw: st.DrawFn, body: Body, nowhere: bool) -> None:
    n = draw(far)
    if nowhere:
        body.line(f"c = {draw(st.sampled_from(['x.mean(1, keepdim=True)', 'x.sum(1, keepdim=True) / S']))}")
    else:
        means = ("x[:, :{n}].mean(1, keepdim=True)", "x.narrow(1, 0, torch.sym_min(S, {n})).mean(1, keepdim=True)",
                 "x.sum(1, keepdim=True) / torch.sym_min(S, {n})", "x[:, -{n}:].mean(1, keepdim=True)",
                 "x.roll(S // {n}, 2).mean(1, keepdim=True)", "x.mean(1, keepdim=True) * (1 + S // {n})")  # fmt: skip
        body.breaks.append(f"the mean of {n} rows")
        body.line(f"c = {draw(st.sampled_from(means)).format(n=n)}")
    body.line("y = x - c")


def _nibbles(draw: st.DrawFn, body: Body, name: str, nowhere: bool) -> Program:
    low, high = (SIGNED_LOW, SIGNED_HIGH) if name == "signed_nibbles" else (LOW, HIGH)
    halves = [draw(st.sampled_from(low)), draw(st.sampled_from(high))]
    if not nowhere:
        place = draw(st.integers(0, 1))
        others = WRONG + ((LOW, HIGH) if name == "signed_nibbles" else (SIGNED_LOW, SIGNED_HIGH))[place]
        halves[place] = draw(st.sampled_from(others)).format(m=draw(st.integers(4, 120)), k=draw(st.integers(4, 14)))
        body.breaks.append(f"half of the numbers: {halves[place]}")
    body.line(f"low, high = {halves[0]}, {halves[1]}")
    body.line("y = torch.stack([low, high], -1).flatten(-2) * s")
    return body.program("example", [Input("p", ("B", "S", 4), "packed"), Input("s", (8,))], "y", pattern=name)
