"""Weights of four bits that are kept several to a word, as formats have them, and taken apart when they are read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

N, K, G = 512, 64, 16
"""Rows, columns, and how many of a row share a scale: more than torch's optimizer folds by itself."""


class Words(nn.Module):
    """x @ weight.T; `pack` makes words of the integers [N, K], `take` takes them apart again."""

    def __init__(self, pack: Callable[[Tensor], Tensor], take: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.take = take
        generator = torch.Generator().manual_seed(4)
        self.integers = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
        self.register_buffer("words", pack(self.integers))
        self.register_buffer("s", torch.rand(N, K // G, generator=generator) * 0.1 + 0.01)
        self.register_buffer("z", torch.randint(0, 16, (N, K // G), dtype=torch.uint8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        apart = self.take(self.words).view(N, K // G, G)
        return x @ ((apart.float() - self.z[..., None].float()) * self.s[..., None]).view(N, K).t()


class Signed(Words):
    """Integers from -8 to 7, kept with 8 added; no zero points."""

    def forward(self, x: Tensor) -> Tensor:
        apart = (self.take(self.words).to(torch.int8) - 8).view(N, K // G, G)
        return x @ (apart.float() * self.s[..., None]).view(N, K).t()


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "the lower half first": (
        lambda q: q[:, 0::2] | (q[:, 1::2] << 4),
        lambda w: torch.stack([w & 15, w >> 4], -1).view(N, K),
    ),
    "the upper half first": (
        lambda q: q[:, 1::2] | (q[:, 0::2] << 4),
        lambda w: torch.stack([w >> 4, w & 0xF], dim=-1).reshape(N, K),
    ),
    "the two halves of a row": (
        lambda q: q[:, : K // 2] | (q[:, K // 2 :] << 4),
        lambda w: torch.cat([torch.bitwise_and(w, 15), torch.bitwise_right_shift(w, 4)], 1),
    ),
}


class GPTQ(nn.Module):
    """Eight to an int32, along the columns of the transposed weight; zero points, one less, eight to an int32 too."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shifts = torch.arange(0, 32, 4)
        integers = torch.randint(0, 16, (K // 8, 8, N), generator=generator)
        zeros = torch.randint(0, 15, (K // G, N // 8, 8), generator=generator)
        self.register_buffer("wf", shifts.to(torch.int32))
        self.register_buffer("qweight", (integers << shifts[:, None]).sum(1).to(torch.int32))
        self.register_buffer("qzeros", (zeros << shifts).sum(2).to(torch.int32))
        self.register_buffer("scales", torch.rand(K // G, N, generator=generator) * 0.1 + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        weight = ((self.qweight[:, None] >> self.wf[None, :, None]) & 15).reshape(K // G, G, N)
        zeros = (((self.qzeros[:, :, None] >> self.wf) & 15) + 1).reshape(K // G, 1, N)
        return x @ ((weight - zeros) * self.scales[:, None]).view(K, N)
