"""Caches as codebases write them: where the keys lie, how new ones get there, and what attention reads.

`T` slots, batch 2, heads of 8. A model with buffers takes `x` and positions; one with `past` takes its caches after
those and returns the new ones after `y`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

B, H, D, T, E = 2, 4, 8, 12, 32
Tensors = tuple[torch.Tensor, ...]


def shapes(**named: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    return MappingProxyType(named)


class Cached(nn.Module):
    """What all have: projections, and attention written once."""

    heads = H
    buffers_: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    past: Tensors = ()
    """Before the first call."""
    grows: tuple[int | None, ...] = ()
    """The axis along which each grows."""
    positions = "vector"
    calls: tuple[int, ...] = (3, 1, 2)
    dynamic = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(E, E + 2 * self.heads * D)
        self.o = nn.Linear(E, E)
        for name, shape in self.buffers_.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8 if name.endswith("int8") else None))
        self.requires_grad_(False)
        self.eval()

    def split(self, x: torch.Tensor) -> Tensors:
        """q, k and v as [B, H, S, D]."""
        parts = self.qkv(x).split([E, self.heads * D, self.heads * D], -1)
        return tuple(t.unflatten(-1, (-1, D)).transpose(1, 2) for t in parts)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] < q.shape[1] else t for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))  # type: ignore

    def tail(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q are the last of k."""
        s, t = q.shape[2], k.shape[2]
        return self.attend(q, k, v, torch.ones(s, t, dtype=torch.bool).tril(t - s))

    def positions_at(self, n: int, s: int) -> Tensors:
        if self.positions == "vector":
            return (torch.arange(n, n + s),)
        return {"start": (torch.tensor([n]),), "rows": (torch.tensor([[n], [n + 2]]),), "none": ()}[self.positions]

    def dynamic_shapes(self) -> Any:
        if not self.dynamic:
            return None
        first = {"vector": ({0: Dim.DYNAMIC},), "none": ()}.get(self.positions, (None,))
        return ({1: Dim.DYNAMIC}, *first, *(None if axis is None else {axis: Dim.DYNAMIC} for axis in self.grows))


def until(positions: torch.Tensor) -> torch.Tensor:
    return torch.arange(T) <= positions[:, None]


class GptFast(Cached):
    heads = 2
    buffers_ = shapes(k=(B, 2, T, D), v=(B, 2, T, D))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        keys, values = self.k, self.v
        keys[:, :, at] = k
        values[:, :, at] = v
        return self.attend(q, keys, values, until(at)[None, None])


class LitGPT(Cached):
    heads = 2
    buffers_ = shapes(k=(B + 1, 2, T, D), v=(B + 1, 2, T, D))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        self.k = self.k.to(k.dtype)
        keys = self.k[: k.size(0)].index_copy_(-2, at, k)
        return self.attend(q, keys, self.v[: k.size(0)].index_copy_(-2, at, v), until(at)[None, None])


class Llama(Cached):
    """As Meta published it, [B, S, H, D], for batches up to 4; the length is read from a tensor."""

    buffers_ = shapes(k=(4, T, H, D), v=(4, T, H, D))
    positions = "start"

    def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        n, s = start.item(), x.shape[1]
        torch._check(n >= 0)
        torch._check(n + s <= T)
        self.k[:B, n : n + s] = k.transpose(1, 2)
        self.v[:B, n : n + s] = v.transpose(1, 2)
        keys, values = self.k[:B, : n + s].transpose(1, 2), self.v[:B, : n + s].transpose(1, 2)
        return self.attend(q, keys, values, torch.arange(n + s) <= (torch.arange(s) + n)[:, None])


class Narrow(Cached):
    buffers_ = shapes(k=(B, H, T, D), v=(B, H, T, D))
    positions = "start"

    def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        n, s = start.item(), x.shape[1]
        torch._check(n >= 0)
        torch._check(n + s <= T)
        self.k.narrow(2, n, s).copy_(k)
        self.v.narrow(2, n, s).copy_(v)
        return self.attend(q, self.k, self.v, until(torch.arange(s) + n))


class Megatron(Cached):
    """[S, B, H, D]: InferenceParams' buffers."""

    buffers_ = shapes(k=(T, B, H, D), v=(T, B, H, D))
    positions = "start"

    def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        n, s = start.item(), x.shape[1]
        torch._check(n >= 0)
        torch._check(n + s <= T)
        self.k[n : n + s, :B, ...] = k.permute(2, 0, 1, 3)
        self.v[n : n + s, :B, ...] = v.permute(2, 0, 1, 3)
        return self.attend(q, self.k.permute(1, 2, 0, 3), self.v.permute(1, 2, 0, 3), until(torch.arange(s) + n))


class OneBuffer(Cached):
    """[2, B, H, T, D]."""

    buffers_ = shapes(kv=(2, B, H, T, D))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        self.kv[0][:, :, at] = k
        self.kv[1, :, :, at] = v
        return self.attend(q, self.kv[0], self.kv[1], until(at))


class AllLayers(Cached):
    """[L, 2, B, H, T, D]."""

    buffers_ = shapes(kv=(2, 2, B, H, T, D))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        for layer in range(2):
            q, k, v = self.split(x)
            self.kv[layer].index_copy_(3, at, torch.stack([k, v]))
            x = x + self.attend(q, *self.kv[layer].unbind(0), until(at))  # type: ignore
        return x


class OneHot(Cached):
    buffers_ = shapes(k=(B, H, T, D), v=(B, H, T, D))
    calls, dynamic = (1, 1, 1), False

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        hot = F.one_hot(at, T).to(x.dtype).view(1, 1, T, 1)
        self.k.copy_(torch.where(hot.bool(), k, self.k))
        self.v.mul_(1 - hot).add_(v * hot)
        return self.attend(q, self.k, self.v, until(at))


class Rolled(Cached):
    buffers_ = shapes(k=(B, H, 4, D), v=(B, H, 4, D))
    positions, calls, dynamic = "none", (1, 1, 1, 1, 1), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        self.k.copy_(torch.roll(self.k, -1, 2))
        self.k[:, :, -1:] = k
        self.v.copy_(torch.cat([self.v[:, :, 1:], v], 2))
        return self.attend(q, self.k, self.v, None)


class Ring(Cached):
    buffers_ = shapes(k=(B, H, 4, D), v=(B, H, 4, D))
    calls, dynamic = (1,) * 6, False

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        self.k.index_copy_(2, at % 4, k)
        self.v.index_copy_(2, at % 4, v)
        return self.attend(q, self.k, self.v, torch.arange(4) <= at[:, None])


class Rows(Cached):
    """Each row at a position of its own."""

    buffers_ = shapes(k=(B, H, T, D), v=(B, H, T, D))
    positions, calls, dynamic = "rows", (1, 1, 1), False

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        self.k[torch.arange(B)[:, None], :, at] = k.transpose(1, 2)
        self.v[torch.arange(B)[:, None], :, at] = v.transpose(1, 2)
        return self.attend(q, self.k, self.v, (torch.arange(T) <= at[:, :, None])[:, None])


class Counted(Cached):
    """The buffer says itself how far it is filled."""

    buffers_ = shapes(k=(B, H, T, D), v=(B, H, T, D))
    positions = "none"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        at = self.seen + torch.arange(x.shape[1])
        self.k[:, :, at] = k
        self.v[:, :, at] = v
        y = self.attend(q, self.k, self.v, until(at))
        self.seen += x.shape[1]
        return y


class Int8(Cached):
    """Quantised, a scale for every key."""

    buffers_ = shapes(k_int8=(B, H, T, D), v_int8=(B, H, T, D), k_scale=(B, H, T, 1), v_scale=(B, H, T, 1))

    def put(self, name: str, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        scale = new.abs().amax(-1, keepdim=True) / 127
        stored, scales = getattr(self, f"{name}_int8"), getattr(self, f"{name}_scale")
        stored[:, :, at] = (new / scale).round().to(torch.int8)
        scales[:, :, at] = scale
        return stored.to(new.dtype) * scales  # type: ignore

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        return self.attend(q, self.put("k", k, at), self.put("v", v, at), until(at))


class InPlace(Cached):
    """The caches are arguments, written to and not returned."""

    past, grows = (torch.zeros(B, H, T, D),) * 2, (None, None)

    def forward(self, x: torch.Tensor, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        keys[:, :, at] = k
        values[:, :, at] = v
        return self.attend(q, keys, values, until(at))


class XTransformers(Cached):
    past, grows, positions = (torch.zeros(B, H, 0, D),) * 2, (2, 2), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat((keys, k), dim=-2), torch.cat((values, v), dim=-2)
        i, j = q.shape[-2], k.shape[-2]
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * D**-0.5
        later = torch.ones(i, j, dtype=torch.bool).triu(j - i + 1)
        weights = dots.masked_fill(later, -torch.finfo(dots.dtype).max).softmax(-1)
        y = torch.einsum("b h i j, b h j d -> b h i d", weights, v)
        return self.o(y.transpose(1, 2).flatten(2)), k, v


class Joined(Cached):
    """Keys joined before SDPA; each cache has a length of its own, as far as the capture knows."""

    past, grows, positions = (torch.zeros(B, H, 0, D),) * 2, (2, 2), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self.tail(q, k, v), k, v


class JoinedBSHD(Cached):
    past, grows, positions = (torch.zeros(B, 0, H, D),) * 2, (1, 1), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k.transpose(1, 2)], 1), torch.cat([values, v.transpose(1, 2)], 1)
        return self.tail(q, k.transpose(1, 2), v.transpose(1, 2)), k, v


class JoinedSBHD(Cached):
    past, grows, positions = (torch.zeros(0, B, H, D),) * 2, (0, 0), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k.permute(2, 0, 1, 3)]), torch.cat([values, v.permute(2, 0, 1, 3)])
        return self.tail(q, k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)), k, v


class Stacked(Cached):
    """GPT-2's `layer_past` [2, B, H, P, D]."""

    past, grows, positions = (torch.zeros(2, B, H, 0, D),), (3,), "none"

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat((past[0], k), -2), torch.cat((past[1], v), -2)
        return self.tail(q, k, v), torch.stack((k, v))


class OneHead(Cached):
    """Multi-query attention over [B, T, D]."""

    heads = 1
    past, grows, positions = (torch.zeros(B, 0, D),) * 2, (1, 1), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k.squeeze(1)], 1), torch.cat([values, v.squeeze(1)], 1)
        s, t = x.shape[1], k.shape[1]
        later = torch.arange(t)[None] > torch.arange(t - s, t)[:, None]
        scores = torch.einsum("bhsd,btd->bhst", q, k) / D**0.5
        y = torch.einsum("bhst,btd->bhsd", scores.masked_fill(later, float("-inf")).softmax(-1), v)
        return self.o(y.transpose(1, 2).flatten(2)), k, v


class Bloom(Cached):
    """Keys transposed, [B, H, D, T]."""

    past, grows, positions = (torch.zeros(B, H, D, 0), torch.zeros(B, H, 0, D)), (3, 2), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k.transpose(2, 3)], -1), torch.cat([values, v], 2)
        s, t = x.shape[1], v.shape[2]
        later = torch.arange(t)[None] > torch.arange(t - s, t)[:, None]
        weights = (q @ k / D**0.5).masked_fill(later, float("-inf")).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), k, v


class Fairseq(Cached):
    """[B·H, T, D] and bmm."""

    past, grows, positions = (torch.zeros(B * H, 0, D),) * 2, (1, 1), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = (t.reshape(-1, t.shape[2], D) for t in self.split(x))
        k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        s, t = x.shape[1], k.shape[1]
        scores = torch.bmm(q * D**-0.5, k.transpose(1, 2)) + torch.full((s, t), float("-inf")).triu(t - s + 1)
        y = torch.bmm(scores.softmax(-1), v).view(-1, H, s, D)
        return self.o(y.transpose(1, 2).flatten(2)), k, v


class Cross(Cached):
    """A decoder's own cache, and the encoder's, which stays."""

    past = (*(torch.zeros(B, H, 0, D),) * 2, *torch.randn(2, B, H, 5, D, generator=torch.Generator().manual_seed(0)))
    grows, positions = (2, 2, None, None), "none"

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, other_keys: torch.Tensor, others: torch.Tensor
    ) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        q = self.split(x + self.tail(q, k, v))[0]
        return self.attend(q, other_keys, others, None), k, v, other_keys, others


class RotatedAfter(Cached):
    """Keys are cached before they are rotated."""

    past, grows, positions = (torch.zeros(B, H, 0, D),) * 2, (2, 2), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        s, t = x.shape[1], k.shape[2]
        angles = torch.outer(torch.arange(t).float(), 10.0 ** -torch.arange(0, 1, 2 / D)).repeat(1, 2)

        def rotated(u: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
            a, b = u.chunk(2, -1)
            return u * f.cos() + torch.cat([-b, a], -1) * f.sin()

        return self.tail(rotated(q, angles[t - s :]), rotated(k, angles), v), k, v


class Window(Cached):
    """The last four of what was joined."""

    past, grows, positions = (torch.zeros(B, H, 4, D),) * 2, (None, None), "none"

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tensors:
        q, k, v = self.split(x)
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return self.tail(q, k, v), k[:, :, -4:], v[:, :, -4:]
