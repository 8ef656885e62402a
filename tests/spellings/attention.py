"""Attention: softmax over the keys of scaled, soft-capped, masked scores, times the values; grouped heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from .generator import Choices, Model, operator_name

WIDTH, HEADS, SIZE = 32, 4, 8
MEMORY = {5: 6, 7: 4}
"""How many memory tokens cross attention gets, by query length."""


def large(dtype: torch.dtype) -> float:
    """A number that hides a key, far below every score that the type can have in practice."""
    return -4e4 if dtype == torch.float16 else -1e9


class Attention(Model):
    """Self or cross attention between its projections."""

    operator = "Attention"

    def __init__(self, choices: Choices, dtype: torch.dtype) -> None:
        super().__init__(choices, dtype)
        c = choices
        # What it means.
        self.kv_heads = c("kv_heads", two=lambda: 2, all=lambda: HEADS, one=lambda: 1)
        self.value_size = c("value_size", same=lambda: SIZE, smaller=lambda: 6)
        self.scale = c("scale", default=lambda: SIZE**-0.5, other=lambda: 0.3, one=lambda: 1.0)
        self.cap = c("cap", none=lambda: 0.0, five=lambda: 5.0)
        self.source = c.name("keys_from", "self", "memory")
        self.data_inputs = ("x", "second") if self.source == "memory" else ("x",)
        kinds = ("causal", "none", "boolean", "additive", "padding", "causal_padding")
        self.mask = c.name("mask", *(kinds if self.source == "self" else kinds[1:-1]))
        # How it is laid out.
        self.form = c.name("form", "sdpa", "eager") if not self.cap else "eager"
        self.fused_projection = self.source == "self" and c.name("projections", "separate", "fused") == "fused"
        sizes = [HEADS * SIZE, self.kv_heads * SIZE, self.kv_heads * self.value_size]
        if self.fused_projection:
            self.qkv = self.projection(WIDTH, sum(sizes))
        else:
            self.q, self.k, self.v = (self.projection(WIDTH, size, bias=i == 0) for i, size in enumerate(sizes))
        self.sizes = sizes
        self.after = self.projection(HEADS * self.value_size, WIDTH)
        self.groups = HEADS // self.kv_heads
        self.register_buffer("head_of", torch.arange(HEADS) // self.groups, persistent=False)
        self.register_buffer("triangle", torch.ones(16, 16, dtype=torch.bool).tril(), persistent=False)

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        draws = torch.Generator().manual_seed(batch * 100 + length)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draws, dtype=torch.float64).to(self.dtype)

        x = normal(batch, length, WIDTH)
        memory = normal(batch, MEMORY.get(length, length), WIDTH) if self.source == "memory" else None
        keys = length if memory is None else memory.shape[1]
        mask = None
        if self.mask in ("padding", "causal_padding"):  # the last keys of some rows are padding
            kept = torch.arange(batch).remainder(3) + keys - 2
            mask = torch.arange(keys)[None, :] < kept[:, None]
        elif self.mask in ("boolean", "additive"):
            mask = torch.rand(batch, 1, length, keys, generator=draws) < 0.6
            mask[..., 0] = True
            if self.mask == "additive":
                mask = normal(*mask.shape).masked_fill(~mask, torch.finfo(torch.float16).min)
        return tuple(value for value in (x, memory, mask) if value is not None)

    def memory_and_mask(self, x: Tensor, second: Tensor | None, third: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the second and third inputs are."""
        return (second, third) if self.source == "memory" else (x, second)

    def projected(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.fused_projection:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        else:
            q, k, v = self.q(x), self.k(memory), self.v(memory)
        return q, k, v

    def reference(self, x: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> Tensor:
        memory, mask = self.memory_and_mask(x, second, third)
        q, k, v = self.projected(x, memory)
        q = q.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        k = k.unflatten(-1, (self.kv_heads, SIZE)).transpose(1, 2)[:, self.head_of]
        v = v.unflatten(-1, (self.kv_heads, self.value_size)).transpose(1, 2)[:, self.head_of]
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        if self.mask == "additive":
            scores = scores + mask
        elif self.mask == "boolean":
            scores = scores.masked_fill(~mask, -math.inf)
        elif "padding" in self.mask:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        if "causal" in self.mask:
            scores = scores.masked_fill(~self.triangle[: scores.shape[-2], : scores.shape[-1]], -math.inf)
        return self.after((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> Tensor:
        memory, mask = self.memory_and_mask(x, second, third)
        q, k, v = self.projected(x, memory)
        y = self.sdpa(q, k, v, mask) if self.form == "sdpa" else self.eager(q, k, v, mask)
        return self.after(self.merged(y))

    # Heads.

    def headed(self, x: Tensor, heads: int) -> Tensor:
        """``[B, S, H·D]`` to ``[B, H, S, D]``."""
        batch, length, size = x.shape[0], x.shape[1], x.shape[2] // heads
        return self.c(
            "heads",
            view=lambda: x.view(batch, length, heads, size).transpose(1, 2),
            unflatten=lambda: x.unflatten(-1, (heads, size)).transpose(1, 2),
            permute=lambda: x.reshape(batch, -1, heads, size).permute(0, 2, 1, 3),
            chunks=lambda: torch.stack(x.chunk(heads, dim=-1), dim=1),
            contiguous=lambda: x.view(batch, length, -1, size).transpose(1, 2).contiguous(),
            moved=lambda: x.view(batch, length, heads, size).movedim(2, 1),
        )

    def merged(self, y: Tensor) -> Tensor:
        """``[B, H, S, D]`` to ``[B, S, H·D]``."""
        batch, length = y.shape[0], y.shape[2]
        return self.c(
            "merge",
            reshape=lambda: y.transpose(1, 2).reshape(batch, length, -1),
            view=lambda: y.transpose(1, 2).contiguous().view(batch, length, HEADS * self.value_size),
            flatten=lambda: y.permute(0, 2, 1, 3).flatten(2),
            cat=lambda: torch.cat([head.squeeze(1) for head in y.split(1, dim=1)], dim=-1),
        )

    def repeated(self, x: Tensor, heads_apart: Tensor) -> Tensor:
        """Each head of `x` ``[B, Hkv, S, D]`` as often as query heads read it; `heads_apart` is ``[B, S, Hkv, D]``."""
        g, kv = self.groups, self.kv_heads
        if g == 1:
            return x
        batch, length, size = x.shape[0], x.shape[2], x.shape[3]
        options: dict[str, Callable[[], Tensor]] = {
            "repeat_interleave": lambda: x.repeat_interleave(g, dim=1),
            "expand_reshape": lambda: (
                x[:, :, None].expand(batch, kv, g, length, size).reshape(batch, HEADS, length, size)
            ),
            "unsqueeze_flatten": lambda: x.unsqueeze(2).expand(-1, -1, g, -1, -1).flatten(1, 2),
            "index_select": lambda: x.index_select(1, self.head_of),
            "index": lambda: x[:, self.head_of],
            "stack": lambda: torch.stack([x] * g, dim=2).flatten(1, 2),
            "cat": lambda: torch.cat([x[:, i // g : i // g + 1] for i in range(HEADS)], dim=1),
            "repeat": lambda: x.unsqueeze(2).repeat(1, 1, g, 1, 1).view(batch, HEADS, length, size),
            "before_transpose": lambda: heads_apart.repeat_interleave(g, dim=2).transpose(1, 2),
            "expand_before_transpose": lambda: (
                heads_apart.unsqueeze(3).expand(batch, length, kv, g, size).flatten(2, 3).transpose(1, 2)
            ),
        }
        if kv == 1:
            options["broadcast"] = lambda: x
            options["expand_heads"] = lambda: x.expand(batch, HEADS, length, size)
        return self.c("repeat_kv", **options)

    # Masks.

    def causal(self, rows: int, columns: int) -> Tensor:
        """True where a query may look."""
        return self.c(
            "causal",
            tril=lambda: torch.ones(rows, columns, dtype=torch.bool).tril(),
            triu=lambda: ~torch.ones(rows, columns, dtype=torch.bool).triu(1),
            compare=lambda: torch.arange(columns)[None, :] <= torch.arange(rows)[:, None],
            greater=lambda: torch.arange(rows).unsqueeze(-1) >= torch.arange(columns),
            buffer=lambda: self.triangle[:rows, :columns],
            difference=lambda: torch.arange(columns)[None, :] - torch.arange(rows)[:, None] < 1,
            logical_not=lambda: torch.logical_not(torch.triu(torch.ones(rows, columns), diagonal=1).bool()),
        )

    def allowed(self, mask: Tensor | None, rows: int, columns: int) -> Tensor | None:
        """The boolean mask, or None where there is none (or an additive one)."""
        c = self.c
        padding = None
        if "padding" in self.mask:
            padding = c("padding", index=lambda: mask[:, None, None, :], view=lambda: mask.view(-1, 1, 1, columns))
        match self.mask:
            case "boolean":
                return mask
            case "padding":
                return padding
            case "causal":
                triangle = self.causal(rows, columns)
                return c("triangle", as_is=lambda: triangle, four_dims=lambda: triangle[None, None])
            case "causal_padding":
                triangle = self.causal(rows, columns)
                return c(
                    "both",
                    operator=lambda: padding & triangle,
                    logical_and=lambda: torch.logical_and(triangle, padding),
                    mul=lambda: padding * triangle,
                )
        return None

    def additive(self, allowed: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask to add: zero where allowed, hugely negative elsewhere."""
        c = self.c
        smallest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        low = c("never", infinity=lambda: -math.inf, smallest=lambda: smallest, large=lambda: large(dtype))
        return c(
            "additive",
            masked_fill=lambda: torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, low),
            where=lambda: torch.where(allowed, 0.0, low).to(dtype),
            filled=lambda: torch.full(allowed.shape, low, dtype=dtype).masked_fill(allowed, 0.0),
            arithmetic=lambda: (1.0 - allowed.to(dtype)) * max(low, smallest),
        )

    # Whole calls.

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        c = self.c
        rows, columns = q.shape[1], k.shape[1]
        q = self.headed(q, HEADS)
        enable_gqa = self.groups > 1 and c.name("grouping", "repeated", "enable_gqa") == "enable_gqa"
        if enable_gqa:
            kr, vr = self.headed(k, self.kv_heads), self.headed(v, self.kv_heads)
        else:
            kr, vr = self.keys_and_values(k, v)
        is_causal = False
        if self.mask == "causal" and c.name("causal_as", "flag", "mask") == "flag":
            attn_mask, is_causal = None, True
        elif self.mask == "additive":
            attn_mask = mask
        else:
            attn_mask = self.allowed(mask, rows, columns)
            if attn_mask is not None and c.name("sdpa_mask", "boolean", "additive") == "additive":
                attn_mask = self.additive(attn_mask, q.dtype)
        scale: float | None = self.scale
        where = c.name("sdpa_scale", "argument", "on_queries", "on_keys")
        if where == "on_queries":
            q, scale = c.scaled("scaling", q, self.scale), 1.0
        elif where == "on_keys":
            kr, scale = kr * (self.scale * SIZE**0.5), None
        elif self.scale == SIZE**-0.5 and c.name("default_scale", "left_out", "given") == "left_out":
            scale = None

        def call(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )

        shape = c.name("sdpa_shape", "four_dims", "three_dims")
        if shape == "three_dims" and not enable_gqa and (attn_mask is None or attn_mask.ndim == 2):
            if kr.shape[1] != HEADS:  # one broadcast head
                kr, vr = (h.expand(-1, HEADS, -1, -1) for h in (kr, vr))
            y = call(q.flatten(0, 1), kr.flatten(0, 1), vr.flatten(0, 1), attn_mask)
            return y.unflatten(0, (-1, HEADS))
        return call(q, kr, vr, attn_mask)

    def keys_and_values(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, H, T, D]``: heads apart and repeated."""
        kv = self.kv_heads
        return (
            self.repeated(self.headed(k, kv), k.unflatten(-1, (kv, SIZE))),
            self.repeated(self.headed(v, kv), v.unflatten(-1, (kv, self.value_size))),
        )

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``softmax(q kᵀ) v``, written out."""
        c = self.c
        rows, columns = q.shape[1], k.shape[1]
        layout = c.name("products", "heads_first", "heads_last", "rows_of_heads", "grouped")
        on_q, on_k, on_scores = self.scaling()
        if layout == "heads_last":  # [B, S, H, D], the einsum sorts it out
            q, k, v = (h.unflatten(-1, (-1, size)) for h, size in ((q, SIZE), (k, SIZE), (v, self.value_size)))
            k, v = (self.repeated(h.transpose(1, 2), h).transpose(1, 2).expand(-1, -1, HEADS, -1) for h in (k, v))
            scores = on_scores(torch.einsum("bqhd,bkhd->bhqk", on_q(q), on_k(k)))
            weights = self.weights(scores, mask, rows, columns, q.dtype)
            y = c(
                "values",
                heads_last=lambda: torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2),
                heads_first=lambda: torch.einsum("bhqk,bkhd->bhqd", weights, v),
            )
            return y
        q = self.headed(q, HEADS)
        if layout == "grouped" and self.groups > 1:  # [B, Hkv, G, S, D]: keys are never repeated
            k, v = self.headed(k, self.kv_heads), self.headed(v, self.kv_heads)
            q = q.unflatten(1, (self.kv_heads, self.groups))
            scores = c(
                "grouped_scores",
                einsum=lambda: torch.einsum("bhgqd,bhkd->bhgqk", on_q(q), on_k(k)),
                matmul=lambda: on_q(q) @ on_k(k).transpose(-1, -2).unsqueeze(2),
            )
            flat = on_scores(scores).flatten(1, 2)
            weights = self.weights(flat, mask, rows, columns, q.dtype).unflatten(1, (self.kv_heads, self.groups))
            y = c(
                "grouped_values",
                einsum=lambda: torch.einsum("bhgqk,bhkd->bhgqd", weights, v),
                matmul=lambda: weights @ v.unsqueeze(2),
            )
            return y.flatten(1, 2)
        k, v = self.keys_and_values(k, v)
        if layout == "rows_of_heads":  # [B·H, S, D]
            if k.shape[1] != HEADS:
                k, v = (h.expand(-1, HEADS, -1, -1) for h in (k, v))
            q, k, v = (h.flatten(0, 1) for h in (on_q(q), on_k(k), v))
            scores = on_scores(
                c(
                    "flat_scores",
                    bmm=lambda: torch.bmm(q, k.transpose(1, 2)),
                    baddbmm=lambda: torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0.0),
                    baddbmm_add=lambda: torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT),
                    einsum=lambda: torch.einsum("nqd,nkd->nqk", q, k),
                )
            )
            weights = self.weights(scores.unflatten(0, (-1, HEADS)), mask, rows, columns, q.dtype)
            return torch.bmm(weights.flatten(0, 1), v).unflatten(0, (-1, HEADS))
        scores = on_scores(self.scores(on_q(q), on_k(k)))
        return self.summed(self.weights(scores, mask, rows, columns, q.dtype), v)

    def scaling(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """What to do to the queries, the keys and the scores."""
        c, scale = self.c, self.scale

        def same(x: Tensor) -> Tensor:
            return x

        def by(factor: float) -> Callable[[Tensor], Tensor]:
            return lambda x: c.scaled("scaling", x, factor)

        return c(
            "scale_where",
            scores=lambda: (same, same, by(scale)),
            queries=lambda: (by(scale), same, same),
            keys=lambda: (same, by(scale), same),
            both=lambda: (by(math.sqrt(scale)), by(math.sqrt(scale)), same),
            queries_and_scores=lambda: (by(2.0), same, by(scale / 2.0)),
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.c(
            "scores",
            matmul=lambda: q @ k.transpose(-1, -2),
            positive_dims=lambda: torch.matmul(q, k.transpose(2, 3)),
            mT=lambda: q @ k.mT,
            permuted=lambda: torch.matmul(q, k.permute(0, 1, 3, 2)),
            einsum=lambda: torch.einsum("bhqd,bhkd->bhqk", q, k.expand(-1, HEADS, -1, -1)),
            einsum_ellipsis=lambda: torch.einsum("...qd,...kd->...qk", q, k),
            sum=lambda: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1),
            transposed=lambda: (k @ q.transpose(-1, -2)).transpose(-1, -2),
        )

    def weights(self, scores: Tensor, mask: Tensor | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Capped, masked and normalised ``[B, H, S, T]`` in `dtype`."""
        c = self.c
        if c.made["precision"] == "low" and c.name("widen_scores", "no", "yes") == "yes":
            scores = c.wide("wide", scores)
        if self.cap:
            scores = c(
                "capped",
                div_mul=lambda: torch.tanh(scores / self.cap) * self.cap,
                left=lambda: self.cap * (scores / self.cap).tanh(),
                mul_mul=lambda: (scores * (1 / self.cap)).tanh() * self.cap,
            )
        if self.mask == "additive":
            scores = c.add("plus_mask", scores, mask.to(scores.dtype))
        elif (allowed := self.allowed(mask, rows, columns)) is not None:
            low = c("fill", infinity=lambda: -math.inf, smallest=lambda: torch.finfo(scores.dtype).min,
                    large=lambda: large(scores.dtype))  # fmt: skip
            scores = c(
                "masked",
                masked_fill=lambda: scores.masked_fill(~allowed, low),
                equals_zero=lambda: scores.masked_fill(allowed == 0, low),
                where=lambda: torch.where(allowed, scores, low),
                where_tensor=lambda: torch.where(allowed, scores, torch.full_like(scores, low)),
                added=lambda: c.add("plus_mask", scores, self.additive(allowed, scores.dtype)),
            )
        wide = torch.promote_types(scores.dtype, torch.float32)
        p = c(
            "softmax",
            functional=lambda: F.softmax(scores, dim=-1),
            torch=lambda: torch.softmax(scores, -1),
            method=lambda: scores.softmax(dim=3),
            wide=lambda: F.softmax(scores, dim=-1, dtype=wide),
            cast_and_back=lambda: F.softmax(scores.to(wide), dim=-1).type_as(scores),
            shifted=lambda: torch.softmax(scores - scores.amax(-1, keepdim=True), -1),
            exponentials=lambda: self.by_exponentials(scores),
            log_softmax=lambda: F.log_softmax(scores, dim=-1).exp(),
            logsumexp=lambda: torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)),
            module=lambda: torch.nn.Softmax(dim=-1)(scores),
        )
        p = p.to(dtype) if c.name("cast_weights", "to", "type") == "to" else p.type(dtype)
        return c(
            "dropout",
            none=lambda: p,
            inactive=lambda: F.dropout(p, 0.1, training=False),
            zero=lambda: F.dropout(p, p=0.0, training=self.training),
        )

    def by_exponentials(self, scores: Tensor) -> Tensor:
        e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return e / e.sum(-1, keepdim=True)

    def summed(self, p: Tensor, v: Tensor) -> Tensor:
        return self.c(
            "values",
            matmul=lambda: p @ v,
            torch_matmul=lambda: torch.matmul(p, v),
            einsum=lambda: torch.einsum("bhqk,bhkd->bhqd", p, v.expand(-1, HEADS, -1, -1)),
            einsum_ellipsis=lambda: torch.einsum("...qk,...kd->...qd", p, v),
            sum=lambda: (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2),
            transposed=lambda: (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2),
        )

    def leftovers(self, program: ExportedProgram) -> list[str]:
        """Unfused arithmetic, and keys or values that come repeated."""
        left = super().leftovers(program)
        for node in program.graph.nodes:
            if operator_name(node) != "fxfuse.attention":
                continue
            for what, arg, size in (("keys", node.args[1], SIZE), ("values", node.args[2], self.value_size)):
                shape = tuple(arg.meta["val"].shape)
                heads = shape[1] if len(shape) == 4 else shape[-1] // size
                if heads != self.kv_heads:
                    left.append(f"{node.name}: {what} with {heads} heads, not {self.kv_heads}")
        return left
