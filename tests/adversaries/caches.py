"""Attention over a cache that grows, writes into one of a fixed length, and what is nearly either."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.adversaries.positions import factor, filled, index, mask
from tests.adversaries.program import TABLE, Body, Input, Program
from tests.adversaries.values import broken, far

HEADS, DIM = 2, 4
JOIN_NOWHERE = ("nowhere", "nowhere", "outside", "before")
JOIN_INSIDE = ("mask", "mask", "keys", "values", "shifted", "narrowed", "scores", "factor", "index")
JOINED = ("j <= i + P", "i + P >= j", "j - i <= P", "torch.ones(S, T, dtype=torch.bool).tril(P)", "~(j > P + i)")
WRITE_NOWHERE = ("nowhere", "nowhere", "outside", "before", "spelled")
WRITE_INSIDE = ("slots", "slots", "slots", "new", "kept", "mixed")
SLOTS = (
    "(start + i) % {n}", "(start + i).clamp(max={n})", "(start + i).to(torch.int8).long() % {t}",
    "(start.bfloat16() + i.bfloat16()).long()", "start + i + (start + i) // {n}", "start + i * (1 + S // {n})",
    "start + i + S // {n}", "start // {n} * {n} + i", "torch.where(start < {n}, start, 0) + i",
    "(start + i) ^ (start >> {b})", "start.clamp(max={n}) + i", "start + i.clamp(max={n})",
    "(start.half() * 1.001).long() + i",
)  # fmt: skip
"""Slots that follow one another near the first only."""


@st.composite
def joins(draw: st.DrawFn) -> Program:
    """Keys joined to their past; both are given back."""
    body = Body(harmless=draw(st.integers(0, 9)) < 4)
    kinds = JOIN_NOWHERE if body.harmless else JOIN_INSIDE
    spot = draw(st.sampled_from(kinds))
    inputs = [Input(n, ("B", HEADS, "S", DIM)) for n in "qkv"]
    inputs += [Input(f"past_{n}", ("B", HEADS, "P", DIM)) for n in "kv"]
    body.line("S, P = q.shape[2], past_k.shape[2]")
    body.line("T = S + P")
    body.line("i, j = torch.arange(S)[:, None], torch.arange(T)[None]")
    for name, broken_at in (("k", "keys"), ("v", "values")):
        if spot == "before":
            body.line(f"{name} = {draw(broken(body, name))}")
        body.line(f"all_{name} = torch.cat([past_{name}, {name}], 2)")
        body.line(f"{name} = all_{name}")
        if spot == broken_at:
            body.line(f"{name} = {draw(broken(body, name, heads=HEADS))}")
    _moved(draw, body, spot)
    causal = draw(st.sampled_from(JOINED))
    shown = draw(mask(body, heads=HEADS, causal=causal, breaks=spot == "mask" and draw(st.booleans())))
    if spot == "mask" and not body.breaks:
        n = draw(far)
        kind = draw(
            st.sampled_from(["(i + P - j < {n})", "((i + P) // {n} == j // {n})", "((i + P - j).half() < {n})"])
        )
        body.breaks.append(f"keys are hidden from {n} on")
        shown = f"({causal}) & {kind.format(n=n)}"
    if shown is not None:
        body.line(f"m = {shown}".replace("torch.ones(S, S", "torch.ones(S, T"))
    if spot not in ("scores", "factor") and draw(st.booleans()):
        body.line(f"y = F.scaled_dot_product_attention(q, k, v{'' if shown is None else ', attn_mask=m'})")
    else:
        body.line("s = q @ k.transpose(-1, -2) * 0.5")
        if spot == "scores":
            body.line(f"s = {draw(broken(body, 's', heads=HEADS))}")
        if spot == "factor":
            body.line(f"s = s * {draw(factor(body, rows=True)).replace('S', 'T')}")
        body.line("y = s.softmax(-1) @ v" if shown is None else "y = s.masked_fill(~m, -math.inf).softmax(-1) @ v")
    if spot == "outside":
        body.line(f"y = {draw(broken(body, 'y'))}")
    given = draw(st.sampled_from(["y, all_k, all_v", "y, all_k, all_v", "y"]))
    return body.program("KVCache", inputs, given)


def _moved(draw: st.DrawFn, body: Body, spot: str) -> None:
    """Keys and values that are not where they were joined, once there are many."""
    n = draw(far)
    if spot == "index":
        body.line(f"far = {draw(index(body, 'T'))}")
    text = {
        "shifted": draw(st.sampled_from(["{n}.roll(T // {f}, 2)", "torch.cat([{n}[:, :, {f}:], {n}[:, :, :{f}]], 2)"])),
        "narrowed": "torch.cat([{n}[:, :, :{f}], {n}[:, :, {f}:] * 0.5], 2)",
        "index": "{n}[:, :, far]",
    }.get(spot)
    if text is not None:
        body.breaks.append(f"{spot} from {n} on" if spot != "index" else "keys by index")
        for name in draw(st.sampled_from(["kv", "k", "v"])):
            body.line(f"{name} = {text.format(n=name, f=n)}")


@st.composite
def writes(draw: st.DrawFn) -> Program:
    """New entries of a cache of a fixed length, at slots that are counted from one number."""
    body = Body(harmless=draw(st.integers(0, 9)) < 4)
    kinds = WRITE_NOWHERE if body.harmless else WRITE_INSIDE
    spot = draw(st.sampled_from(kinds))
    inputs = [
        Input("past", ("B", HEADS, TABLE, DIM)),
        Input("new", ("B", HEADS, "S", DIM)),
        Input("start", (), "start"),
    ]
    body.line("S = new.shape[2]")
    body.line("i = torch.arange(S)")
    slots = draw(st.sampled_from(["start + i", "i + start", "torch.arange(S) + start", "i.add(start)"]))
    if spot == "slots":
        slots = draw(filled(draw(st.sampled_from(SLOTS)))).replace("{t}", str(TABLE))
        body.breaks.append(f"the slots are {slots}")
    if spot in ("new", "before"):
        body.line(f"new = {draw(broken(body, 'new', heads=HEADS))}")
    if spot == "kept":
        body.line(f"past = {draw(broken(body, 'past', heads=HEADS))}")
    if spot == "mixed":
        n = draw(far)
        body.breaks.append(f"what is written is in another order from {n} on")
        kind = draw(st.sampled_from(["new.roll(S // {n}, 2)", "torch.cat([new[:, :, {n}:], new[:, :, :{n}]], 2)"]))
        body.line(f"new = {kind.format(n=n)}")
    body.line(f"slots = {slots}")
    kinds = ("past.index_copy(2, slots, new)", "torch.ops.aten.index_put(past, [None, None, slots], new)")
    body.line(f"y = {draw(st.sampled_from(kinds))}")
    if spot == "outside":
        body.line(f"y = {draw(broken(body, 'y'))}")
    return body.program("TensorScatter", inputs, "y * 2")
