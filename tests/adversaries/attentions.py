"""Attention with its masks, and what is nearly one."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.adversaries.positions import factor, index, mask
from tests.adversaries.program import Body, Input, Program
from tests.adversaries.values import bounds, broken, epsilons, far, gate

HEADS, DIM = 2, 4
FILLS = ("-math.inf", "torch.finfo(s.dtype).min", "-1e9", "-1e30", "-3e8")
SHALLOW = ("-1e3", "-1e4", "-500.0", "-5e4", "-1e6")
NOWHERE = ("nowhere", "nowhere", "nowhere", "outside", "before", "values")
INSIDE = (
    "scores", "scores", "masked scores", "weights", "gate", "denominator", "mask", "mask", "mask", "fill", "two fills",
    "factor", "head scales", "keys", "head order", "narrowed", "row maximum", "operands", "bias",
)  # fmt: skip
SCORES = (
    "q @ k.transpose(-1, -2) * 0.5", "(q * 0.5) @ k.transpose(-1, -2)", "q @ k.transpose(-1, -2) / math.sqrt({d})",
    "torch.einsum('bhid,bhjd->bhij', q, k) * {d} ** -0.5", "torch.matmul(q, k.mT) / 2.0", "0.5 * (k @ q.mT).mT",
    "(q * 0.7071067811865476) @ (k * 0.7071067811865476).mT", "torch.matmul(q, k.transpose(2, 3)).mul(0.5)",
)  # fmt: skip
MASKED = (
    "s.masked_fill(~{m}, {f})", "torch.where({m}, s, {f})", "s + torch.zeros({m}.shape).masked_fill(~{m}, {f})",
    "s.masked_fill({m} == 0, {f})", "torch.where({m}.logical_not(), {f}, s)", "s + torch.where({m}, 0.0, {f})",
)  # fmt: skip
SOFTMAX = ("s.softmax(-1)", "F.softmax(s, dim=-1)", "torch.softmax(s, -1)", "F.softmax(s, dim=-1, dtype=torch.float32)")


@st.composite
def attentions(draw: st.DrawFn) -> Program:
    body = Body(harmless=draw(st.integers(0, 9)) < 4)
    kinds = NOWHERE if body.harmless else INSIDE
    spot = draw(st.sampled_from(kinds))
    groups = draw(st.sampled_from([1, 1, 2]))
    inputs = [Input("q", ("B", HEADS, "S", DIM)), *(Input(n, ("B", HEADS // groups, "S", DIM)) for n in "kv")]
    body.line("S = q.shape[2]")
    body.line("i, j = torch.arange(S)[:, None], torch.arange(S)[None]")
    _operands(draw, body, spot, groups)
    shown = _mask(draw, body, spot, inputs)
    if spot in (*NOWHERE, "mask", "keys", "head order", "narrowed", "operands") and draw(st.booleans()):
        _sdpa(draw, body, shown)
    else:
        body.line(f"s = {draw(st.sampled_from(SCORES)).format(d=DIM)}")
        _scores(draw, body, spot, shown)
        _weights(draw, body, spot)
        body.line(f"y = {draw(st.sampled_from(['w @ v', 'torch.matmul(w, v)']))}")
    if spot == "outside":
        body.line("y = y + 0.5")
        body.line(f"y = {draw(broken(body, 'y'))}")
    return body.program("Attention", inputs, "y")


def _operands(draw: st.DrawFn, body: Body, spot: str, groups: int) -> None:
    if groups > 1:
        spelling = "{n}.repeat_interleave(2, 1)" if draw(st.booleans()) else "{n}.expand(-1, 2, -1, -1)"
        for name in "kv":
            body.line(f"{name} = {spelling.format(n=name)}")
    if spot in ("before", "operands"):
        for name in draw(st.sampled_from(["q", "k", "qk"])):
            body.line(f"{name} = {draw(broken(body, name, heads=HEADS))}")
    if spot == "values":
        body.line(f"v = {draw(broken(body, 'v', heads=HEADS))}")
    if spot == "keys":
        body.line(f"far = {draw(index(body, 'S'))}")
        for name in draw(st.sampled_from(["kv", "kv", "k", "v"])):
            how = draw(st.sampled_from(["{n}[:, :, far]", "{n}.index_select(2, far)"]))
            body.line(f"{name} = {how.format(n=name)}")
    if spot == "head order":
        n = draw(far)
        body.breaks.append(f"heads are in another order from length {n} on")
        body.line(f"order = (torch.arange({HEADS}) + S // {n}) % {HEADS}")
        for name in draw(st.sampled_from(["k", "kv", "v"])):
            body.line(f"{name} = {name}[:, order]")
    if spot == "narrowed":
        n = draw(far)
        kind = draw(st.sampled_from(["{n}.roll(S // {f}, 2)", "torch.cat([{n}[:, :, {f}:], {n}[:, :, :{f}]], 2)"]))
        body.breaks.append(f"keys and values are shifted from {n} on")
        for name in draw(st.sampled_from(["kv", "v"])):
            body.line(f"{name} = {kind.format(n=name, f=n)}")


def _mask(draw: st.DrawFn, body: Body, spot: str, inputs: list[Input]) -> str | None:
    """The keys that are shown, as `m`; with masks and padding that the model is given."""
    shown = draw(mask(body, heads=HEADS, breaks=spot == "mask"))
    parts = [] if shown is None else [f"({shown})"]
    given = draw(st.sampled_from(["", "", "mask", "padding"])) if spot not in ("keys", "two fills") else "padding"
    if given == "mask":
        inputs.append(Input("seen", ("B", 1, "S", "S"), "mask"))
        parts.append("seen")
    elif given == "padding":
        inputs.append(Input("pad", ("B", "S"), "padding"))
        parts.append("pad[:, None, None]")
    if spot == "two fills":
        if shown is None:
            parts.insert(0, "(j <= i)")
        body.line(f"m, n = {parts[0]}, {parts[1]}")
        return "m"
    if not parts and spot in ("fill", "masked scores"):
        parts = ["(j <= i)"]
    if not parts:
        return None
    body.line(f"m = {' & '.join(parts)}")
    return "m"


def _sdpa(draw: st.DrawFn, body: Body, shown: str | None) -> None:
    if shown is None:
        spelling = "F.scaled_dot_product_attention(q, k, v)"
    elif draw(st.booleans()):
        spelling = "F.scaled_dot_product_attention(q, k, v, attn_mask=m)"
    else:
        fill = draw(st.sampled_from(["-math.inf", "torch.finfo(torch.float32).min", "-1e9", "-1e4"]))
        body.line(f"m = torch.zeros(m.shape).masked_fill(~m, {fill})")
        spelling = "F.scaled_dot_product_attention(q, k, v, attn_mask=m)"
        _count(body, fill)
    body.line(f"y = {spelling}")


def _count(body: Body, fill: str) -> None:
    """A fill at or below -1e8 is a mask for the scores above it."""
    if fill.startswith("-") and fill[1].isdigit() and float(fill) <= -1e8:
        body.fill = max(body.fill, float(fill))


def _scores(draw: st.DrawFn, body: Body, spot: str, shown: str | None) -> None:
    if spot == "scores":
        body.line(f"s = {draw(broken(body, 's', heads=HEADS))}")
    if spot == "factor":
        body.line(f"s = s * {draw(factor(body, rows=True))}")
    if spot == "head scales":
        scale = f"torch.tensor([1.0, {draw(st.sampled_from([1.0, 1.001, 0.5, 2.0, 1.00001]))}])[:, None, None]"
        body.breaks.append("a scale for each head")
        body.line(f"s = s * {body.buffer('scales', scale, draw(st.booleans()))}")
    if spot == "bias":
        c = draw(bounds)
        kinds = (f"torch.minimum((j - i) * 0.01, s * 0 + {c})", f"((j - i) * 0.01).clamp(min=-{draw(far)} * 0.01)")
        body.breaks.append("a bias by distance, bounded")
        body.line(f"s = s + {draw(st.sampled_from(kinds))}")
    if draw(st.integers(0, 5)) == 0 and spot not in ("scores",):
        body.line(f"s = {draw(st.sampled_from([5.0, 50.0]))} * torch.tanh(s / 50.0)")
    if shown is not None:
        fill = draw(st.sampled_from(SHALLOW if spot in ("fill", "two fills") else FILLS))
        if spot in ("fill", "two fills"):
            body.breaks.append(f"hidden keys have the score {fill}")
        _count(body, fill)
        body.line(f"s = {draw(st.sampled_from(MASKED)).format(m='m', f=fill)}")
        if spot == "two fills":
            second = draw(st.sampled_from(SHALLOW + FILLS))
            _count(body, second)
            body.line(f"s = {draw(st.sampled_from(MASKED)).format(m='n', f=second)}")
    if spot == "masked scores":
        body.line(f"s = {draw(broken(body, 's'))}")
        body.fill = max(body.fill, -1e8) if "1.0e+08" in body.breaks[-1] else body.fill


def _weights(draw: st.DrawFn, body: Body, spot: str) -> None:
    if spot in ("denominator", "row maximum") or draw(st.integers(0, 4)) == 0:
        body.line("t = s.amax(-1, keepdim=True)")
        if spot == "row maximum":
            body.line(f"t = {draw(broken(body, 't'))}")
        body.line("e = (s - t).exp()")
        body.line("d = e.sum(-1, keepdim=True)")
        if spot == "denominator":
            kind = draw(
                st.sampled_from(["d + {e}", "d.clamp(min={e})", "d + {e} * S", "d + (1 - torch.exp(-d * {e}))"])
            )
            epsilon = draw(epsilons)
            body.breaks.append(f"the denominator is {kind.format(e=epsilon)}")
            body.line(f"d = {kind.format(e=epsilon)}")
        body.line("w = e / d")
    else:
        body.line(f"w = {draw(st.sampled_from(SOFTMAX))}")
    if spot == "weights":
        body.line(f"w = {draw(broken(body, 'w', positive=True))}")
    if spot == "gate":
        body.line(
            f"g = {draw(st.sampled_from(['s.amax(-1, keepdim=True)', 'q.norm(dim=-1, keepdim=True)', 'q[..., :1]']))}"
        )
        body.line(f"w = w * {draw(gate(body, 'g'))}")
    if draw(st.integers(0, 7)) == 0:
        body.line("w = w.nan_to_num()")
