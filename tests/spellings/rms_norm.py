"""RMS norm: ``x / sqrt(mean(x²) + eps) * weight`` over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .generator import Choices, Model

WIDTH, HEADS = 24, 3


class RMSNorm(Model):
    """A norm over hidden states or over heads, with a weight, ``1 + weight`` or none."""

    operator = "RMSNormalization"

    def __init__(self, choices: Choices, dtype: torch.dtype) -> None:
        super().__init__(choices, dtype)
        c = choices
        self.site = c.name("site", "hidden", "heads", "heads_transposed", "heads_unflattened", "rows", "length_first")
        self.size = WIDTH // HEADS if self.site.startswith("heads") else WIDTH
        self.eps = c("eps", e5=lambda: 1e-5, e6=lambda: 1e-6, e3=lambda: 1e-3)
        self.gain = c.name("gain", "weight", "one_plus_weight", "none")
        if dtype == torch.float16:
            self.eps = max(self.eps, 1e-5)
        self.before = self.projection(WIDTH, WIDTH, bias=True)
        self.after = self.projection(WIDTH, WIDTH)
        shape = c("weight_shape", flat=lambda: (self.size,), broadcast=lambda: (1, 1, self.size))
        self.weight = nn.Parameter(self.draw(*shape))
        self.register_buffer("eps_tensor", torch.tensor(self.eps, dtype=torch.promote_types(dtype, torch.float32)))
        self.register_buffer("ones", torch.ones(self.size, 1, dtype=torch.promote_types(dtype, torch.float32)))

    def inputs(self, batch: int, length: int) -> tuple[Tensor, ...]:
        draws = torch.Generator().manual_seed(batch * 100 + length)
        return (torch.randn(batch, length, WIDTH, generator=draws, dtype=torch.float64).to(self.dtype),)

    def reference(self, x: Tensor) -> Tensor:
        h = self.before(x)
        shape = h.shape
        h = h.view(*shape[:-1], -1, self.size)
        h = h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = self.weight.view(self.size)
        h = {"weight": h * weight, "one_plus_weight": h * (1 + weight), "none": h}[self.gain]
        return self.after(h.view(shape))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        batch, length, _ = h.shape
        heads = (batch, length, HEADS, self.size)
        match self.site:
            case "hidden":
                y = self.spelled(h)
            case "heads":
                y = self.spelled(h.view(heads)).reshape(batch, length, WIDTH)
            case "heads_transposed":
                y = self.spelled(h.view(heads).transpose(1, 2)).transpose(1, 2).reshape(batch, length, WIDTH)
            case "heads_unflattened":
                y = self.spelled(h.unflatten(-1, (HEADS, self.size))).flatten(-2)
            case "rows":
                y = self.spelled(h.reshape(-1, WIDTH)).view(batch, length, WIDTH)
            case "length_first":
                y = self.spelled(h.transpose(0, 1)).transpose(0, 1)
        return self.after(y)

    def spelled(self, x: Tensor) -> Tensor:
        c = self.c
        form = c.name("form", "factor", "quotient", "sum_of_squares", "channels_first", "builtin")
        if form == "builtin":
            return self.builtin(x)
        h = x
        if c.made["precision"] == "low" or c.name("widen", "no", "yes") == "yes":
            h = c.wide("wide", x)
        if form == "channels_first":  # the mean runs over a middle dimension
            h = h.transpose(-1, -2)
            h = h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + self.eps)
            return self.weighted(h.transpose(-1, -2), x)
        if form == "sum_of_squares":  # x · √D / √(Σx² + D·eps)
            total = self.sum_of_squares(h)
            total = total + self.size * self.eps
            root = self.size**0.5
            h = c(
                "sum_form",
                last=lambda: h * torch.rsqrt(total) * root,
                first=lambda: (h * root) * torch.rsqrt(total),
                factor=lambda: h * (torch.rsqrt(total) * root),
                quotient=lambda: h / torch.sqrt(total) * root,
                divided_root=lambda: h / (torch.sqrt(total) / root),
            )
            return self.weighted(h, x)
        mean = self.shifted(self.mean_of_squares(h))
        if form == "quotient":
            root = c(
                "root",
                sqrt=lambda: torch.sqrt(mean),
                pow_half=lambda: mean.pow(0.5),
                method=lambda: mean.sqrt(),
                operator=lambda: mean**0.5,
            )
            h = c(
                "divide",
                operator=lambda: h / root,
                method=lambda: h.div(root),
                torch_div=lambda: torch.div(h, root),
                expanded=lambda: h / root.expand_as(h),
            )
            return self.weighted(h, x)
        factor = c(
            "inverse_root",
            rsqrt=lambda: torch.rsqrt(mean),
            method=lambda: mean.rsqrt(),
            one_over_sqrt=lambda: 1.0 / torch.sqrt(mean),
            pow=lambda: mean.pow(-0.5),
            torch_pow=lambda: torch.pow(mean, -0.5),
            sqrt_reciprocal=lambda: torch.sqrt(mean).reciprocal(),
            reciprocal_sqrt=lambda: torch.sqrt(torch.reciprocal(mean)),
            ones_over_sqrt=lambda: torch.ones_like(mean) / mean.sqrt(),
            sqrt_pow=lambda: mean.sqrt() ** -1,
        )
        association = c.name("association", "input_first", "weight_first", "factor_first")
        if self.gain == "none" or association == "input_first" or c.made["precision"] == "low":
            return self.weighted(c.mul("normalize", h, factor), x)
        weight = self.gains(h)
        if association == "weight_first":
            h = c.mul("normalize", c.mul("scale", h, weight), factor)
        else:
            h = c.mul("normalize", h, c.mul("scale", factor, weight))
        return c.back("back", h, x)

    def squares(self, x: Tensor) -> Tensor:
        return self.c(
            "squares",
            pow=lambda: x.pow(2),
            mul=lambda: x * x,
            square=lambda: torch.square(x),
            operator=lambda: x**2,
            float_power=lambda: torch.pow(x, 2.0),
            abs=lambda: x.abs().pow(2),
            method=lambda: x.mul(x),
        )

    def sum_of_squares(self, x: Tensor) -> Tensor:
        """Over the last dimension, which is kept."""
        return self.c(
            "total",
            sum=lambda: self.squares(x).sum(-1, keepdim=True),
            vector_norm=lambda: torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2,
            norm=lambda: x.norm(p=2, dim=-1, keepdim=True).pow(2),
            einsum=lambda: torch.einsum("...d,...d->...", x, x).unsqueeze(-1),
            matmul=lambda: (x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1),
            ones=lambda: self.squares(x) @ self.ones,
            vecdot=lambda: torch.linalg.vecdot(x, x).unsqueeze(-1),
        )

    def mean_of_squares(self, x: Tensor) -> Tensor:
        size = self.size
        return self.c(
            "mean",
            mean=lambda: self.squares(x).mean(-1, keepdim=True),
            torch_mean=lambda: torch.mean(self.squares(x), dim=-1, keepdim=True),
            positive_dim=lambda: self.squares(x).mean(x.ndim - 1, keepdim=True),
            dims=lambda: self.squares(x).mean(dim=[-1], keepdim=True),
            unsqueezed=lambda: self.squares(x).mean(-1).unsqueeze(-1),
            indexed=lambda: self.squares(x).mean(-1)[..., None],
            sum_div=lambda: self.sum_of_squares(x) / size,
            sum_mul=lambda: self.sum_of_squares(x) * (1.0 / size),
            sum_div_shape=lambda: self.sum_of_squares(x) / x.shape[-1],
            norm=lambda: (x.norm(dim=-1, keepdim=True) * size**-0.5) ** 2,
            scaled_squares=lambda: (x * size**-0.5).pow(2).sum(-1, keepdim=True),
        )

    def shifted(self, mean: Tensor) -> Tensor:
        eps = self.eps
        return self.c(
            "shift",
            add=lambda: mean + eps,
            left=lambda: eps + mean,
            torch_add=lambda: torch.add(mean, eps),
            tensor=lambda: mean + self.eps_tensor,
            minus=lambda: mean - (-eps),
        )

    def gains(self, like: Tensor) -> Tensor:
        """The weight in the dtype of `like`."""
        weight = self.weight
        if like.dtype != weight.dtype:
            weight = weight.to(like.dtype)
        if weight.ndim == 3 and like.ndim > 3:
            weight = self.c("weight_view", view=lambda: weight.view(self.size), squeeze=lambda: weight.squeeze())
        elif weight.ndim == 3 and like.ndim < 3:
            weight = weight.reshape(-1)
        if self.gain == "one_plus_weight":
            return self.c("one_plus", left=lambda: 1.0 + weight, right=lambda: weight + 1)
        return weight

    def weighted(self, normal: Tensor, x: Tensor) -> Tensor:
        """`normal` cast back to the dtype of `x`, before or after the weight."""
        c = self.c
        if self.gain == "none":
            return c.back("back", normal, x)
        if c.name("cast", "after_weight", "before_weight") == "before_weight":
            normal = c.back("back", normal, x)
            return c.mul("scale", normal, self.gains(normal))
        if self.gain == "one_plus_weight" and c.name("plus_one_as", "product", "sum") == "sum":
            plain = self.weight.to(normal.dtype).reshape(-1)
            return c.back("back", c.add("plus", normal, normal * plain), x)
        return c.back("back", c.mul("scale", normal, self.gains(normal)), x)

    def builtin(self, x: Tensor) -> Tensor:
        weight = None if self.gain == "none" else self.gains(x).reshape(self.size)

        def wide() -> Tensor:
            h = self.c.wide("wide", x)
            gains = None if weight is None else weight.to(h.dtype)
            return self.c.back("back", F.rms_norm(h, (self.size,), gains, self.eps), x)

        def weight_after() -> Tensor:
            h = F.rms_norm(x, (self.size,), eps=self.eps)
            return h if weight is None else h * weight

        return self.c(
            "builtin",
            functional=lambda: F.rms_norm(x, (self.size,), weight, self.eps),
            torch=lambda: torch.rms_norm(x, [self.size], weight, self.eps),
            weight_after=weight_after,
            wide=wide,
        )
