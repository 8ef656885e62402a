"""Rotary embedding: every pair of entries of a head turned by its position times its frequency."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .generator import CONTEXT, Choices, Model, unfused

WIDTH, HEADS, KV_HEADS, SIZE, LENGTH = 32, 4, 2, 8, 16


class Rotary(Model):
    """Queries and keys rotated between their projections and whatever reads them."""

    operator = "RotaryEmbedding"

    def __init__(self, choices: Choices, dtype: torch.dtype) -> None:
        super().__init__(choices, dtype)
        c = choices
        # What it means.
        self.pairing = c.name("pairing", "halves", "interleaved")
        self.turned = c("turned", all=lambda: SIZE, first_half=lambda: SIZE // 2)
        self.factor = c("factor", one=lambda: 1.0, other=lambda: 0.8)
        self.positions = c.name("positions", "counted", "per_batch", "one_row")
        # How it is laid out.
        self.layout = c.name("layout", "bshd", "bhsd", "sbhd")
        self.projections = c.name("projections", "separate", "fused_split", "fused_slices")
        self.keys = c.name("keys", "like_queries", "own_spelling", "joint")
        self.consumer = c.name("consumer", "merge", "attention")
        self.expected = 1 if self.keys == "joint" else 2

        sizes = (HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE)
        if self.projections == "separate":
            self.q, self.k, self.v = (self.projection(WIDTH, size) for size in sizes)
        else:
            self.qkv = self.projection(WIDTH, sum(sizes))
        self.after = self.projection(HEADS * SIZE if self.consumer == "attention" else sum(sizes[:2]), WIDTH)

        self.exact = torch.promote_types(dtype, torch.float32)  # caches and angles are never narrower
        half = self.turned // 2
        frequencies = 100.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(LENGTH, dtype=torch.float64), frequencies)
        cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
        caches = {
            "frequencies": frequencies,
            "cos": cos,
            "sin": sin,
            "cos_full": self.doubled_as_constant(cos),
            "sin_full": self.doubled_as_constant(sin),
            "pairs": torch.stack((cos, sin), -1),
            "packed": torch.cat((cos, sin), -1),
            "sign": self.doubled_as_constant(torch.ones(half, dtype=torch.float64), -torch.ones(half)),
        }
        for name, value in caches.items():
            self.register_buffer(name, value.to(self.exact), persistent=False)
        self.register_buffer("cis", torch.complex(self.cos, self.sin), persistent=False)
        self.register_buffer("partner", self.partners(), persistent=False)
        turn = torch.zeros(self.turned, self.turned, dtype=self.exact)
        turn[self.partner, torch.arange(self.turned)] = self.sign
        self.register_buffer("turn", turn, persistent=False)

    def doubled_as_constant(self, value: Tensor, first: Tensor | None = None) -> Tensor:
        first = value if first is None else first.to(value.dtype)
        if self.pairing == "halves":
            return torch.cat((first, value), -1)
        return torch.stack((first, value), -1).flatten(-2)

    def partners(self) -> Tensor:
        """For each entry the one it is turned with."""
        i = torch.arange(self.turned)
        return i.roll(self.turned // 2) if self.pairing == "halves" else i ^ 1

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        draws = torch.Generator().manual_seed(batch * 100 + length)
        x = torch.randn(batch, length, WIDTH, generator=draws, dtype=torch.float64).to(self.dtype)
        match self.positions:
            case "counted":
                return (x,)
            case "one_row":
                return x, torch.randperm(LENGTH, generator=draws)[:length]
        return x, torch.stack([torch.randperm(LENGTH, generator=draws)[:length] for _ in range(batch)])

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with their heads apart: ``[B, S, H, D]``."""
        nq, nk = HEADS * SIZE, KV_HEADS * SIZE
        if self.projections == "separate":
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.projections == "fused_split":
            q, k, v = self.qkv(x).split([nq, nk, nk], dim=-1)
        else:
            h = self.qkv(x)
            q, k, v = h[..., :nq], h[..., nq : nq + nk], h[..., nq + nk :]

        def heads(h: Tensor) -> Tensor:
            return self.c(
                "heads",
                view=lambda: h.view(*h.shape[:2], -1, SIZE),
                unflatten=lambda: h.unflatten(-1, (-1, SIZE)),
                reshape=lambda: h.reshape(h.shape[0], h.shape[1], h.shape[2] // SIZE, SIZE),
            )

        return heads(q), heads(k), heads(v)

    def consumed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated queries and keys ``[B, S, H, D]`` or, with attention behind, ``[B, H, S, D]``."""
        if self.consumer == "merge":
            return self.after(torch.cat((q.flatten(2), k.flatten(2)), -1))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), enable_gqa=True)
        return self.after(y.transpose(1, 2).flatten(2))

    def reference(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        q, k, v = self.projected(x)
        if position is None:
            position = torch.arange(x.shape[1])
        angle = (position.to(self.exact)[..., None] * self.frequencies).unsqueeze(-2)
        cos, sin = (angle.cos() * self.factor).to(x.dtype), (angle.sin() * self.factor).to(x.dtype)

        def turned(h: Tensor) -> Tensor:
            h, rest = h[..., : self.turned], h[..., self.turned :]
            a, b = h.chunk(2, -1) if self.pairing == "halves" else (h[..., ::2], h[..., 1::2])
            return torch.cat((self.doubled_as_constant(a * sin + b * cos, a * cos - b * sin), rest), -1)

        q, k = turned(q), turned(k)
        if self.consumer == "attention":
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return self.consumed(q, k, v)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        c = self.c
        q, k, v = self.projected(x)
        into = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3), "sbhd": (1, 0, 2, 3)}[self.layout]

        def moved(h: Tensor, order: tuple[int, ...]) -> Tensor:
            swapped = [d for d in range(4) if order[d] != d]
            if not swapped:
                return h
            return c("move", transpose=lambda: h.transpose(swapped[0], swapped[1]), permute=lambda: h.permute(order))

        q, k = moved(q, into), moved(k, into)
        cache = Cache(self, position, x.shape[1])
        if self.keys == "joint":
            axis = self.layout.index("h")
            q, k = self.spelled(torch.cat((q, k), axis), cache).split([HEADS, KV_HEADS], dim=axis)
        else:
            q = self.spelled(q, cache)
            if self.keys == "own_spelling":
                with c.scope("k."):
                    k = self.spelled(k, cache)
            else:
                k = self.spelled(k, cache)
        if self.layout == "bhsd" and self.consumer == "attention":
            return self.consumed(q, k, v)
        q, k = moved(q, into), moved(k, into)
        if self.consumer == "attention":
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return self.consumed(q, k, v)

    def leftovers(self, program: torch.export.ExportedProgram) -> list[str]:
        return unfused(program, self.data_inputs, CONTEXT | {"scaled_dot_product_attention"})

    def spelled(self, x: Tensor, cache: Cache) -> Tensor:
        """`x` rotated, in whatever layout it is."""
        c, r = self.c, self.turned
        if r == SIZE:
            return self.rotated(x, cache)
        part, rest = c(
            "part",
            slices=lambda: (x[..., :r], x[..., r:]),
            split=lambda: x.split([r, SIZE - r], dim=-1),
            narrow=lambda: (x.narrow(-1, 0, r), x.narrow(-1, r, SIZE - r)),
            split_at=lambda: x.tensor_split((r,), dim=-1),
        )
        part = self.rotated(part, cache)
        return c(
            "whole", cat=lambda: torch.cat((part, rest), dim=-1), positive=lambda: torch.cat([part, rest], x.ndim - 1)
        )

    def rotated(self, x: Tensor, cache: Cache) -> Tensor:
        c = self.c
        form = c.name("form", "rotate", "parts", "complex", "matrices", "permuting_matrix")
        precision = "wide"  # complex numbers have no low precision
        if form != "complex":
            precision = c.name("casts", "promoted", "wide", "narrow")
        h = c.wide("wide", x) if precision == "wide" else x

        def fit(value: Tensor) -> Tensor:
            return value.to(x.dtype) if precision == "narrow" else value

        match form:
            case "rotate":
                cos, sin = fit(cache.full("cos")), fit(cache.full("sin"))
                y = c.add("sum", c.mul("straight", h, cos), self.crossed(h, sin))
            case "permuting_matrix":
                cos, sin = fit(cache.full("cos")), fit(cache.full("sin"))
                dense = (
                    h.contiguous() if self.layout == "sbhd" else h
                )  # else export fixes the batch: matmul asks strides
                y = c.add("sum", c.mul("straight", h, cos), c.mul("across", dense @ self.turn.to(h.dtype), sin))
            case "parts":
                y = self.parts(h, fit(cache.half("cos")), fit(cache.half("sin")))
            case "complex":
                y = self.complex_product(h, cache)
            case "matrices":
                y = self.matrix_product(h, fit(cache.half("cos")), fit(cache.half("sin")))
        return c.back("back", y, x)

    def two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two entries of every pair."""
        if self.pairing == "halves":
            return self.c.halves("two", x, self.turned // 2)
        return self.c.evens_and_odds("two", x, self.turned // 2)

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """The inverse of `two`."""
        if self.pairing == "halves":
            return self.c(
                "join",
                cat=lambda: torch.cat((a, b), dim=-1),
                concat=lambda: torch.concat([a, b], a.ndim - 1),
                stack_flatten=lambda: torch.stack((a, b), dim=-2).flatten(-2),
                stack_reshape=lambda: torch.stack([a, b], dim=-2).reshape(*a.shape[:-1], self.turned),
            )
        return self.c(
            "join_pairs",
            stack_flatten=lambda: torch.stack((a, b), dim=-1).flatten(-2),
            stack_reshape=lambda: torch.stack([a, b], dim=-1).reshape(*a.shape[:-1], -1),
            stack_view=lambda: torch.stack([a, b], dim=a.ndim).view(*a.shape[:-1], self.turned),
            cat_flatten=lambda: torch.cat((a.unsqueeze(-1), b.unsqueeze(-1)), dim=-1).flatten(-2),
            cat_flatten_from=lambda: torch.cat((a[..., None], b[..., None]), dim=-1).flatten(start_dim=a.ndim - 1),
        )

    def negative(self, x: Tensor) -> Tensor:
        return self.c("negative", operator=lambda: -x, method=lambda: x.neg(), mul=lambda: x * -1.0, sub=lambda: 0 - x)

    def crossed(self, x: Tensor, sin: Tensor) -> Tensor:
        """`x` with the entries of each pair swapped, the first negative, times `sin`."""
        c = self.c

        def two() -> Tensor:
            a, b = self.two(x)
            return self.joined(self.negative(b), a)

        def swapped() -> Tensor:
            half = self.turned // 2
            shape = (2, half) if self.pairing == "halves" else (half, 2)
            axis = -2 if self.pairing == "halves" else -1
            options = {
                "gather": lambda: x[..., self.partner],
                "index_select": lambda: x.index_select(-1, self.partner),
                "flip": lambda: x.unflatten(-1, shape).flip(axis).flatten(-2),
            }
            if self.pairing == "halves":
                options["roll"] = lambda: x.roll(half, dims=-1)
                options["roll_back"] = lambda: torch.roll(x, shifts=-half, dims=-1)
            return c("swap", **options)

        return c(
            "cross",
            two=lambda: c.mul("across", two(), sin),
            signed_input=lambda: c.mul("across", swapped() * self.sign.to(x.dtype), sin),
            signed_sin=lambda: c.mul("across", swapped(), sin * self.sign.to(sin.dtype)),
        )

    def parts(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.c
        a, b = self.two(x)
        first = c(
            "first",
            difference=lambda: c.sub("minus", c.mul("a_cos", a, cos), c.mul("b_sin", b, sin)),
            negative_sin=lambda: a * cos + b * self.negative(sin),
            negative_b=lambda: c.add("plus", a * cos, self.negative(b) * sin),
            addcmul=lambda: torch.addcmul((a * cos).to(torch.promote_types(b.dtype, sin.dtype)), b, sin, value=-1),
        )
        second = c(
            "second",
            sum=lambda: c.add("plus", c.mul("b_cos", b, cos), c.mul("a_sin", a, sin)),
            sum_swapped=lambda: c.add("plus", c.mul("a_sin", a, sin), c.mul("b_cos", b, cos)),
            difference=lambda: b * cos - a * self.negative(sin),
            addcmul=lambda: torch.addcmul((b * cos).to(torch.promote_types(a.dtype, sin.dtype)), a, sin),
        )
        return self.joined(first, second)

    def complex_product(self, x: Tensor, cache: Cache) -> Tensor:
        c, half = self.c, self.turned // 2

        def paired() -> Tensor:
            """``[..., r/2, 2]``."""
            if self.pairing == "halves":
                return x.unflatten(-1, (2, half)).transpose(-1, -2).contiguous()
            return x.reshape(*x.shape[:-1], -1, 2)

        z = c(
            "as_complex",
            view=lambda: torch.view_as_complex(paired()),
            complex=lambda: torch.complex(*self.two(x)),
            stacked=lambda: torch.view_as_complex(torch.stack(self.two(x), dim=-1)),
        )
        z = c.mul("turn", z, cache.complex())
        if self.pairing == "halves":
            return c(
                "as_real",
                parts=lambda: torch.cat((z.real, z.imag), -1),
                transposed=lambda: torch.view_as_real(z).transpose(-1, -2).flatten(-2),
                unbound=lambda: torch.cat(torch.view_as_real(z).unbind(-1), -1),
            )
        return c(
            "as_real_pairs",
            flatten=lambda: torch.view_as_real(z).flatten(-2),
            reshape=lambda: torch.view_as_real(z).reshape(x.shape),
            stack=lambda: torch.stack((z.real, z.imag), -1).flatten(-2),
        )

    def matrix_product(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """A 2×2 matrix for each pair."""
        c = self.c
        pairs = torch.stack(self.two(x), -1)
        matrices = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2)).to(pairs.dtype)
        y = c(
            "product",
            einsum=lambda: torch.einsum("...oi,...i->...o", matrices, pairs),
            matmul=lambda: (matrices @ pairs.unsqueeze(-1)).squeeze(-1),
            sum=lambda: (matrices * pairs.unsqueeze(-2)).sum(-1),
            columns=lambda: matrices[..., 0] * pairs[..., :1] + matrices[..., 1] * pairs[..., 1:],
        )
        return self.joined(*y.unbind(-1))


class Cache:
    """Cosines and sines of the positions at hand, made as the choices say and shaped to broadcast over the heads."""

    def __init__(self, model: Rotary, position: Tensor | None, length: int) -> None:
        self.m, self.c = model, model.c
        self.position, self.length = position, length
        self.source = self.c.name("source", "halves", "full", "pairs", "packed", "frequencies", "complex")

    def taken(self, cache: Tensor) -> Tensor:
        """The rows of a cache at the positions."""
        at = self.position
        if at is None:
            return self.c(
                "rows",
                slice=lambda: cache[: self.length],
                narrow=lambda: cache.narrow(0, 0, self.length),
                slice_all=lambda: cache[0 : self.length, ...],
                gather=lambda: cache[torch.arange(self.length)],
            )
        options = {
            "gather": lambda: cache[at],
            "index_select": lambda: cache.index_select(0, at.flatten()).unflatten(0, at.shape),
        }
        if cache.ndim == 2 and not cache.is_complex():
            options["embedding"] = lambda: F.embedding(at, cache)
        return self.c("gathered", **options)

    def angles(self) -> Tensor:
        """Positions times frequencies, ``[S, r/2]`` or ``[B, S, r/2]``."""
        c, m = self.c, self.m
        where = torch.arange(self.length) if self.position is None else self.position
        where = where.to(m.exact)
        base = c(
            "frequencies",
            buffer=lambda: m.frequencies,
            power=lambda: 100.0 ** -(torch.arange(0, m.turned, 2, dtype=m.exact) / m.turned),
            reciprocal=lambda: 1.0 / (100.0 ** (torch.arange(0, m.turned, 2, dtype=m.exact) / m.turned)),
        )
        if where.ndim == 1:
            return c(
                "angles",
                outer=lambda: torch.outer(where, base),
                einsum=lambda: torch.einsum("s,f->sf", where, base),
                mul=lambda: where[:, None] * base[None, :],
                matmul=lambda: where.unsqueeze(-1) @ base.unsqueeze(0),
            )
        return c(
            "batched_angles",
            mul=lambda: where[..., None] * base,
            einsum=lambda: torch.einsum("bs,f->bsf", where, base),
            matmul=lambda: (base[None, :, None].expand(where.shape[0], -1, 1) @ where[:, None, :]).transpose(1, 2),
            plain_matmul=lambda: where.unsqueeze(-1) @ base[None, None, :],
        )

    def scaled(self, value: Tensor) -> Tensor:
        factor = self.m.factor
        return value if factor == 1 else self.c("factor_as", mul=lambda: value * factor, left=lambda: factor * value)

    def half(self, name: str) -> Tensor:
        """``cos`` or ``sin``, once for each pair."""
        return self.over_heads(self._half(name))

    def _half(self, name: str) -> Tensor:
        c, m = self.c, self.m
        index = ("cos", "sin").index(name)
        match self.source:
            case "halves":
                return self.taken(getattr(m, name))
            case "full":
                return self.of_full(self.taken(getattr(m, f"{name}_full")))
            case "pairs":
                rows = self.taken(m.pairs)
                return c("of_pair", index=lambda: rows[..., index], select=lambda: rows.select(-1, index),
                         unbind=lambda: rows.unbind(-1)[index])  # fmt: skip
            case "packed":
                return c.halves("packed_as", self.taken(m.packed), m.turned // 2)[index]
            case "complex":
                rows = self.taken(m.cis)
                return rows.real if name == "cos" else rows.imag
        angles = self.angles()
        if c.name("doubled", "angles", "values") == "angles":  # as in full(), but then taken apart again
            angles = self.of_full(self.double(angles))
        return self.scaled(getattr(angles, name)())

    def full(self, name: str) -> Tensor:
        """``cos`` or ``sin`` for every entry."""
        if self.source == "full":
            return self.over_heads(self.taken(getattr(self.m, f"{name}_full")))
        if self.source == "frequencies" and self.c.name("doubled", "angles", "values") == "angles":
            return self.over_heads(self.scaled(getattr(self.double(self.angles()), name)()))
        if self.c.name("double_when", "last", "first") == "last":
            return self.double(self.half(name))
        return self.over_heads(self.double(self._half(name)))

    def double(self, value: Tensor) -> Tensor:
        if self.m.pairing == "halves":
            return self.c(
                "double",
                cat=lambda: torch.cat((value, value), dim=-1),
                repeat=lambda: value.repeat(*[1] * (value.ndim - 1), 2),
                tile=lambda: value.tile((2,)),
                stack=lambda: torch.stack((value, value), -2).flatten(-2),
                expand=lambda: value.unsqueeze(-2).expand(*value.shape[:-1], 2, value.shape[-1]).flatten(-2),
            )
        return self.c(
            "double_pairs",
            repeat_interleave=lambda: value.repeat_interleave(2, dim=-1),
            stack=lambda: torch.stack((value, value), -1).flatten(-2),
            expand=lambda: value.unsqueeze(-1).expand(*value.shape, 2).flatten(-2),
            repeat=lambda: value[..., None].repeat(*[1] * value.ndim, 2).flatten(-2),
        )

    def of_full(self, value: Tensor) -> Tensor:
        """Each pair's value out of a full cache."""
        half = self.m.turned // 2
        if self.m.pairing == "halves":
            return self.c(
                "of_full",
                first=lambda: value[..., :half],
                second=lambda: value[..., half:],
                chunk=lambda: value.chunk(2, -1)[0],
            )
        return self.c("of_full_pairs", evens=lambda: value[..., ::2], odds=lambda: value[..., 1::2])

    def complex(self) -> Tensor:
        c, m = self.c, self.m
        if self.source == "complex":
            return self.over_heads(self.taken(m.cis))
        if self.source == "pairs" and c.name("complex_from", "whole", "parts") == "whole":
            return self.over_heads(torch.view_as_complex(self.taken(m.pairs)))
        if self.source == "frequencies" and c.name("complex_of_angles", "polar", "parts") == "polar":
            angles = self.angles()
            return self.over_heads(torch.polar(torch.full_like(angles, m.factor), angles))
        cos, sin = self.half("cos"), self.half("sin")
        return c(
            "complex_of_parts",
            complex=lambda: torch.complex(cos, sin),
            view=lambda: torch.view_as_complex(torch.stack((cos, sin), -1)),
        )

    def over_heads(self, value: Tensor) -> Tensor:
        """``[S, …]`` or ``[B, S, …]`` shaped for the layout."""
        c, layout = self.c, self.m.layout
        batched = value.ndim == 3
        if layout == "bshd":
            return c(
                "over_heads",
                unsqueeze=lambda: value.unsqueeze(-2),
                index=lambda: value[..., None, :],
                view=lambda: value.reshape(-1 if batched else 1, self.length, 1, value.shape[-1]),
            )
        if layout == "bhsd":
            if batched:
                return c("over_heads", unsqueeze=lambda: value.unsqueeze(1), index=lambda: value[:, None])
            return c(
                "over_heads_unbatched",
                broadcast=lambda: value,
                index=lambda: value[None, None],
                view=lambda: value.reshape(1, 1, self.length, value.shape[-1]),
            )
        if batched:
            value = value.transpose(0, 1)
            return c("over_heads", unsqueeze=lambda: value.unsqueeze(2), index=lambda: value[:, :, None, :])
        return c("over_heads", index=lambda: value[:, None, None, :],
                 view=lambda: value.reshape(self.length, 1, 1, -1))  # fmt: skip
