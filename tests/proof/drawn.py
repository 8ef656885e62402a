"""Small programs of positions and sizes that are drawn: rows `v0`, `v1`, … of length S, and squares `g0`, `g1`, …"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

# fmt: off
TABLES = {
    "counts": torch.arange(3, 19, 2),
    "ends": torch.tensor([5, 5, 5, 5, 5, 5, 5, 6]),
    "signs": torch.tensor([1., -1.] * 4),
    "lower": torch.ones(8, 8).tril(),
    "holes": torch.ones(8, 8, dtype=torch.bool).tril().index_fill(1, torch.tensor(6), False),
    "narrow": torch.tensor([0, 127, -128, -1, 1, 2, 3, 4], dtype=torch.int8),
}
"""Eight rows each."""
NUMBERS = (
    "0", "1", "2", "3", "4", "5", "7", "8", "16", "100", "127", "128", "200", "255", "256", "257", "2**24", "2**31",
    "-1", "-2", "-3", "-8", "True", "0.5", "2.0", "-0.0", "0.1", "2.5", "-1e9", "1e9", "math.inf", "-math.inf",
    "math.nan", "torch.finfo(torch.float32).min", "S", "S // 2", "S - 3",
)
DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "int64", "float16", "bfloat16", "float32", "float32",
    "float64",
)
COMPARES = (">=", ">", "<=", "<", "==", "!=")
ROWS = (
    "torch.arange(S)", "torch.arange(S)", "torch.arange(1, S + 1)", "torch.arange(S - 1, -1, -1)", "torch.ones(S)",
    "torch.arange(0, 3 * S, 3)", "torch.zeros(S, dtype=torch.{d})", "torch.full((S,), {n})",
    "torch.arange(S, dtype=torch.{d})", "torch.full((S,), {n}, dtype=torch.{d})", "counts[torch.arange(S) % 8]",
    "signs[torch.arange(S) % 8]", "ends[torch.arange(S) % 7]", "narrow[torch.arange(S) % 8]",
    "torch.arange(S).to(torch.{d})",
)
ONE = (
    "{a} + {n}", "{a} - {n}", "{n} - {a}", "{a} * {n}", "{a} // {n}", "{a} % {n}", "torch.fmod({a}, {n})",
    "{a} >> {k}", "{a} << {k}", "{a} & {n}", "{a} | {n}", "{a} ^ {n}", "{a}.to(torch.{d})", "{a}.to(torch.{d})",
    "{a}.type_as({b})", "-{a}", "{a}.abs()", "{a}.clamp({n}, {n})", "{a}.clamp(min={n})", "{a}.clamp(max={n})",
    "{a} / {n}", "{a}.floor()", "{a}.round()", "~{a}", "{a}.logical_not()", "{a}.relu()", "{a} {c} {n}",
    "{a} {c} {n}", "{a}.masked_fill({b} {c} {n}, {n})", "torch.where({a} {c} {n}, {b}, {n})", "{a}.clone()",
    "{a}.contiguous()", "torch.div({a}, {n}, rounding_mode='trunc')", "torch.div({a}, {n}, rounding_mode='floor')",
    "{a}.double().exp()", "{a}.log()", "{a}.reciprocal()", "{a} ** 2", "torch.where({a} {c} {n}, {n}, {n})",
    "torch.full_like({a}, {n})", "torch.rsub({a}, {n})", "{a}.sign()", "{a}.trunc()",
    "torch.add({a}, {b}, alpha={n})", "{a}.square()", "{a}.bool()", "{a}.isinf()", "{a}.isnan()", "{a}.nan_to_num()",
)
TWO = (
    "{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} // {b}", "{a} % {b}", "{a} {c} {b}", "{a} {c} {b}", "{a} & {b}",
    "{a} | {b}", "{a} ^ {b}", "torch.maximum({a}, {b})", "torch.minimum({a}, {b})", "torch.where({a} > 1, {a}, {b})",
    "{a} / {b}", "torch.logical_and({a}, {b})", "torch.logical_xor({a}, {b})", "torch.logical_or({a}, {b})",
    "{a}.clamp(max={b})",
)
MOVED = (
    "{a}.flip(0)", "torch.cat([{a}, {b}])[S:]", "torch.cat([{a}[:1], {a}])[:S]", "torch.cat([{a}, {b}], 0)[:S]",
    "torch.stack([{a}, {b}], -1)[..., {z}]", "torch.stack([{a}, {b}])[{z}]", "{a}.repeat_interleave(2, dim=0)[:S]",
    "{a}.repeat_interleave(3, dim=0)[::3]", "{a}[:, None].expand(S, 3)[:, 1]", "{a}.view(1, S)[0]",
    "{a}[None, :, None].flatten()", "{a}[torch.arange(S) // 2]", "{a}.index_select(0, torch.arange(S) // 3)",
    "{a}.gather(0, torch.arange(S) // 2)", "{a}[torch.arange(S) - 1]", "{a}[torch.arange(S).flip(0)]",
    "F.embedding({a}.long() % 8, lower)[:, {z}]", "lower[{a}.long() % 8, {z}]",
    "holes[{a}.long() % 8, {b}.long() % 8]", "{a}.cumsum(0)", "torch.diff({a}, prepend={a}[:1])",
    "torch.diff({a}, prepend={b}[:1])", "{a}.unsqueeze(1).repeat(1, 2).view(-1)[:S]",
    "torch.stack([{a}, {b}, {a}], 1).permute(1, 0)[{z}]", "{a}[:, None].T[0]",
    "torch.stack([{a}, {b}], 1).flatten()[::2]", "torch.stack([{a}, {b}], 1).roll(1, 1)[:, {z}]",
    "{a}.unsqueeze(-1).squeeze()", "torch.stack([{a}, {b}], 1).chunk(2, -1)[{z}].squeeze(-1)",
    "torch.stack([{a}, {b}]).unbind(0)[{z}]", "{a}[-1:].expand(S)", "torch.stack([{a}, {b}], 1).view(2, S)[{z}]",
    "torch.cat([{a}[1:], {a}[:1]])", "torch.cat([{a}[-1:], {a}[:-1]])", "{a}[{z}].expand(S)",
    "torch.stack([{a}, {b}], 1).movedim(0, 1)[{z}]", "torch.stack([{a}, {b}], 1).reshape(S, 1, 2)[..., 0, {z}]",
    "{a}.narrow(0, 0, S)",
)
SQUARES = (
    "{a}[:, None] {c} {b}", "{a}[:, None] {c} {b}[None]", "{a}[:, None] - {b}", "{a}[:, None] * {b}",
    "torch.ones(S, S).tril({k})", "torch.full((S, S), {n}).triu({k})", "torch.outer({a}, {b})",
    "torch.ones(S, S, dtype=torch.{d}).triu(-{k})", "torch.eye(S)", "torch.einsum('i,j->ij', {a}, {b})",
    "{a}.expand(S, S)", "{a}[:, None] @ {b}[None]", "torch.zeros(S, S, dtype=torch.{d})",
    "torch.vmap(torch.vmap(lambda i, j: {body}, (None, 0)), (0, None))({a}, {b})",
)
BODIES = (
    "i >= j", "(i >= j) & (i - j < {k})", "i // 4 == j // 4", "torch.where(i > j, i, j)", "i * j + {n}",
    "(i + {n}) % 3",
)
OF_SQUARES = (
    "{g}.T", "{g}.mT", "{g}.tril({k})", "{g}.triu(-{k})", "{g}.flip(1)", "{g} + {a}", "{g} * {h}", "{g} & {h}",
    "{g} | {h}", "{g}.masked_fill({h} > 0, {n})", "torch.where({h} != 0, {g}, {n})", "{g} {c} {h}", "{g} {c} {n}",
    "{g}.to(torch.{d})", "1 - {g}", "{g} * {n}", "{g}[torch.arange(S) // 2]", "{g}[:, torch.arange(S) - 1]", "~{g}",
    "torch.where({g} > 0, {a}, {h})", "-{g}", "{g}[None].expand(2, S, S)[{z}]",
    "{g}[torch.arange(S)[:, None], torch.arange(S).flip(0)]", "torch.cat([{g}, {h}], 1)[:, S:]", "{g}.cumsum(-1)",
    "torch.stack([{g}, {h}], -1).view(S, S, 2)[..., {z}]", "{g}[:, None].squeeze(1)", "{g}.transpose(0, 1)",
)
TO_ROWS = ("{g}[0]", "{g}[:, -1]", "{g}[-1]", "{g}[:, {z}]", "{g}[S // 2]", "{g}.select(1, S - 1)")
WRITES = (
    "{a}.add_({n})", "{a}.mul_({b})", "{a}.fill_({n})", "{a}[0].fill_({n})", "{a}[1:].mul_(2)", "{a}[:2].zero_()",
    "{a}.copy_({b})", "{a}[:-1].add_(1)", "{a}[-1].fill_({n})", "{a}[S // 2].fill_({n})", "{a}[S // 2:].fill_({n})",
    "{a}[:S // 2].add_({n})", "{a}.sub_({b})", "{g}[0] = {n}", "{g}[:, 0] = {a}", "{g}[:, -1].fill_({n})",
    "{g}.masked_fill_({h} > 0, {n})", "{g}.tril_()", "{g}.T[0].fill_({n})", "{g}.transpose(0, 1)[0].copy_({a})",
    "{g}[1:, :2] = {n}", "{g}[1:][1:].add_(1)", "{g}.add_({a})", "{a}.clamp_(max={k})",
    "with torch.no_grad(): {g}[0].fill_({n})", "with torch.no_grad(): {a}.add_(1)", "{a}.detach().add_(1)",
    "{a}.neg_()", "{a}.ge_({b})", "{a}.view(1, S)[0].add_(1)", "{a}.contiguous().add_(1)", "{g}[0].copy_({g}[1])",
    "{g}.logical_or_({h})", "{a}.floor_divide_({n})", "{a}.to(torch.int64).add_(1)", "{a}.remainder_({n})",
    "{g}[:, 1:].copy_({g}[:, :-1].clone())",
)
# fmt: on


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, ...]:
    """Lines; those that PyTorch does not run are left out."""
    names: dict[str, Any] = _names(7)
    rows, squares, lines = list[str](), list[str](), list[str]()

    def line(kinds: tuple[str, ...]) -> None:
        template = draw(st.sampled_from(kinds))
        own = rows if kinds in (ROWS, ONE, TWO, MOVED, TO_ROWS) else squares
        name = f"{'v' if own is rows else 'g'}{len(own)}"
        text = _filled(draw, template, rows, squares)
        text = text if kinds is WRITES else f"{name} = {text}"
        try:
            exec(text, names)
        except Exception:
            return
        lines.append(text)
        if kinds is not WRITES:
            own.append(name)

    while len(rows) < 2:
        line(ROWS)
    for _ in range(draw(st.integers(2, 9))):
        kinds = (ROWS, ONE, ONE, ONE, TWO, TWO, MOVED, MOVED, SQUARES)
        line(draw(st.sampled_from((*kinds, WRITES, OF_SQUARES, OF_SQUARES, TO_ROWS) if squares else kinds)))
    return (*lines, f"result = [{', '.join(rows + squares)}]")


def _filled(draw: st.DrawFn, template: str, rows: list[str], squares: list[str]) -> str:
    while "{" in template:
        before, _, rest = template.partition("{")
        field, _, after = rest.partition("}")
        choices: Any = {
            "a": rows[-3:], "b": rows, "g": squares[-2:], "h": squares, "n": NUMBERS, "d": DTYPES, "c": COMPARES,
            "k": "0123", "z": "01", "body": BODIES,
        }[field]  # fmt: skip
        template = before + draw(st.sampled_from(choices)) + after
    return template


def _names(length: Any) -> dict[str, Any]:
    import math

    import torch.nn.functional as F

    return {"torch": torch, "F": F, "math": math, "S": length, **TABLES}


def function(lines: tuple[str, ...]) -> Callable[..., list[Tensor]]:
    """The program as a function of the length and of `TABLES`."""
    code = compile("\n".join(lines), "<drawn>", "exec")

    def run(length: int, *tables: Tensor) -> list[Tensor]:
        names = _names(length) | dict(zip(TABLES, tables, strict=True))
        exec(code, names)
        result: list[Tensor] = names["result"]
        return result

    return run
