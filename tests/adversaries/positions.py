"""Breaks of positions and sizes: masks, factors and indices that are the plain ones for short sequences only."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.adversaries.program import TABLE, Body
from tests.adversaries.values import far

# fmt: off
CAUSAL = (
    "j <= i", "i >= j", "~(j > i)", "i - j >= 0", "j < i + 1", "j - i <= 0", "j.float() <= i.float()",
    "(i - j).clamp(min=0) == i - j", "torch.ones(S, S, dtype=torch.bool).tril()", "torch.full((S, S), 1.0).tril() > 0",
    "~torch.ones(S, S, dtype=torch.bool).triu(1)", "i * 2 + 1 > j * 2", "j * j <= i * i", "j / 7 <= i / 7",
    "(j <= i) & (i - j < 100000)", "(j <= i) | (j > i + 100000)",
)
"""Spellings of one mask (some of them beyond all lengths that are run only)."""
HIDES = (
    "i - j < {n}", "j > i - {n}", "(i - j).abs() < {n}", "i - j <= {n}", "(i - j) // {n} < 1", "(i - j) // {m} < {k}",
    "(i - j) >> {b} < 1", "(i - j).float() / {n} < 1", "(i - j) * 0.01 < {n} * 0.01", "(i - j).pow(2) < {n} * {n}",
    "torch.exp((j - i) / {n}) > 0.3679", "(i - j).float().sqrt() < {n} ** 0.5",
    "i // {n} == j // {n}", "(i >> {b}) == (j >> {b})", "torch.div(i, {n}, rounding_mode='floor') * {n} <= j",
    "torch.floor(i / {n}) == torch.floor(j / {n})", "(i * (1 / {n})).long() == (j * (1 / {n})).long()",
    "(i // {m} // {k}) == (j // {m} // {k})", "j >= (i // {n}) * {n}",
    "(i - j < {n}) | ((i - j) % {m} == 0)", "(i - j < {n}) | (j < {m})", "((i - j) % {n} != {n} - 1)",
    "((i ^ j) < {n})", "(i & ~({n} - 1)) <= j", "i - j < torch.sym_max({n}, S // 2)", "i - j < {n} + S // 1000",
    "j >= S // {n}", "i - j < torch.clamp(i, min={n}, max={n} + {m})", "torch.ones(S, S, dtype=torch.bool).triu(-{n})",
    "(j < {n}) | (j % 2 == 0)", "(i < {n}) | (j > 0)", "i.to(torch.int8) >= j.to(torch.int8)",
    "torch.where(i < {n}, 0, i - {n}) <= j",
)
"""Keys that the causal mask shows and these hide, beyond some length."""
SHOWS = (
    "(j < {m}) & (i >= {n})", "j < S // {n}", "(j < {m}) & (S > {n})", "j.bfloat16() <= i.bfloat16()",
    "j - S // {n} <= i", "j <= i + i // {n}",
    "j <= i + (i >> {b})", "j * 0.999 <= i", "j.clamp(max={n}) <= i",
    "(j - {n}).clamp(min=0) * 0 + j <= i * (1 + S // {n})",
    "torch.ones(S, S, dtype=torch.bool).tril(S // {n})", "j % {n} <= i", "j.to(torch.int8) <= i.to(torch.int8)",
)
"""Keys that the causal mask hides and these show, beyond some length."""
FACTORS = (
    "(1 + S // {n})", "torch.sym_max(1.0, S / {n})", "(1 + (S > {n}) * 1.0)", "(1.0 / torch.sym_max(1, S // {n}))",
    "torch.sym_min(1.0, {n} / S)",
)
"""Numbers that are 1 for short sequences only."""
TEMPERATURES = (
    "(1.0 + i // {n})", "(torch.log(i + 1.0) / math.log({n})).clamp(min=1.0)", "(i / {n}).clamp(min=1.0)",
    "torch.where(i < {n}, 1.0, 0.5)", "(1 + 0.1 * torch.log1p(torch.floor((i + 1.0) / {n})))", "0.5 ** (i // {n})",
    "(1.0 + (i >> {b}))", "torch.maximum(i / {n}, torch.ones(()))",
)
"""Numbers by position that are 1 near the start only."""
INDICES = (
    "torch.arange({S}).clamp(max={n})", "torch.arange({S}) ^ (torch.arange({S}) >> {b})",
    "(torch.arange({S}) + {S} // {n}) % {S}", "torch.arange({S}) % {n}", "torch.arange({S}).bfloat16().long()",
    "torch.arange({S}) - torch.arange({S}) // {n}", "torch.arange({S}).minimum(torch.tensor({n}))",
    "(torch.arange({S}) * 1.004).long().clamp(max={S} - 1)", "torch.arange({S}) // {n} * {n} + torch.arange({S}) % {n}",
)
"""Indices that are 0, 1, 2, … near the start only (the last of them always)."""
# fmt: on


@st.composite
def filled(draw: st.DrawFn, spelling: str) -> str:
    """The spelling with numbers for n (far out), m (a little), k (how many m make n) and b (a power of two)."""
    n, m = draw(far), draw(st.integers(2, 40))
    numbers = {"n": n, "m": m, "k": max(2, n // m), "b": draw(st.integers(5, 8))}
    for name, value in numbers.items():
        spelling = spelling.replace("{" + name + "}", str(value))
    return spelling


@st.composite
def table(draw: st.DrawFn, body: Body, heads: int) -> str:
    """A mask in a buffer, causal but for its tail or for one of the heads."""
    n, size = draw(far), TABLE
    mask = f"torch.ones({size}, {size}, dtype=torch.bool).tril()"
    row, column = f"(torch.arange({size})[:, None] >= {n})", f"(torch.arange({size}) == {draw(st.integers(0, 15))})"
    kind = draw(st.sampled_from(["hole", "later keys", "another head", "whole"]))
    if kind == "hole":
        mask = f"{mask} & ~({row} & {column})"
    elif kind == "later keys":
        mask = f"{mask} | ({row} & (torch.arange({size}) < {size}))"
    elif kind == "another head":
        mask = f"torch.stack([{mask}] * {heads - 1} + [{mask} & ~({row} & {column})])"
    if kind != "whole":
        body.breaks.append(f"a table of masks: {kind} from {n} on")
    name = body.buffer("shown", mask, draw(st.booleans()))
    if draw(st.booleans()):
        return f"{name}[..., :S, :S]"
    return f"{name}[..., torch.arange(S)[:, None], torch.arange(S)]"


@st.composite
def mask(draw: st.DrawFn, body: Body, *, heads: int, causal: str = "", breaks: bool = True) -> str | None:
    """A mask over i and j (queries and keys), True where a key is seen; None: all are.

    Args:
        causal: the plain mask; one of many spellings by default.
        breaks: whether it may hide or show others, far out.
    """
    plain = causal or draw(st.sampled_from(CAUSAL))
    if not breaks:
        return draw(st.sampled_from([plain, plain, plain, None]))
    kind = draw(st.sampled_from(["hides", "hides", "hides", "shows", "alone", "table", "heads"]))
    if kind == "table":
        return draw(table(body, heads))
    if kind == "heads":
        windows = [draw(far), *[10**6] * (heads - 1)]
        body.breaks.append(f"a window of {windows[0]} in one head")
        name = body.buffer("windows", f"torch.tensor({windows})[:, None, None]", draw(st.booleans()))
        return f"({plain}) & (i - j < {name})"
    more = draw(filled(draw(st.sampled_from(SHOWS if kind == "shows" else HIDES))))
    body.breaks.append(f"the mask: {more}")
    if kind == "alone":
        return more
    return f"({plain}) {'|' if kind == 'shows' else '&'} ({more})"


@st.composite
def factor(draw: st.DrawFn, body: Body, *, rows: bool) -> str:
    """A number that is 1 for short sequences, or (`rows`) near the start only; it reads S, or i as a column."""
    kinds = [FACTORS, TEMPERATURES] if rows else [FACTORS]
    expression = draw(filled(draw(st.sampled_from(draw(st.sampled_from(kinds))))))
    body.breaks.append(f"a factor {expression}")
    return expression


@st.composite
def index(draw: st.DrawFn, body: Body, size: str) -> str:
    """Positions 0 to `size`, the wrong ones far out."""
    expression = draw(filled(draw(st.sampled_from(INDICES)))).replace("{S}", size)
    body.breaks.append(f"an index {expression}")
    return expression
