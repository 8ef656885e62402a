"""Norms that are none somewhere: beyond a bound, from a position on, or at another length."""

from __future__ import annotations

import pytest
import torch

from tests.proof.kinds import Model, X, check, drawn, fuse, normed, sampled

NORM = {
    "variance is capped": lambda x, w: normed(x, w, lambda m: m.clamp(max=1e4)),
    "variance has a floor": lambda x, w: normed(x, w, lambda m: m.clamp(min=1e-4)),
    "of what is clamped": lambda x, w: x * torch.rsqrt(x.clamp(-1e4, 1e4).square().mean(-1, True) + 1e-6) * w,
    "a gain that is bounded": lambda x, w: x * torch.rsqrt(x.square().mean(-1, True) + 1e-12).clamp(max=1e4) * w,
    "no massive activations": lambda x, w: normed(torch.where(x.abs() > 1e4, 0.0, x), w),
    "a weight by position": lambda x, w: normed(x, w) * (0.5 ** (torch.arange(x.shape[1]) // 64))[:, None],
    "a factor by length": lambda x, w: normed(x, w * (1 + x.shape[1] // 64)),
    "an epsilon by length": lambda x, w: normed(x, w, lambda m: m + 1e-2 * (x.shape[1] // 64)),
}
NORM_FUSED = {
    "plain": lambda x, w: normed(x, w),
    "weight of one more": lambda x, w: normed(x, 1 + w),
    "a root and a quotient": lambda x, w: w * x / (x.square().mean(-1, True) + 1e-6).sqrt(),
}


@pytest.mark.parametrize("case", sampled(NORM, "variance is", "a gain", "a weight", "an epsilon"))
def test_norms_that_are_none_somewhere(case):
    made = fuse(Model(NORM[case], {"w": 1 + drawn(16)}), [X[1]], ((0, 1),))
    check(made, [[x] for x in X])
    assert made.done or not made.entries or made.entries[0].reason


@pytest.mark.parametrize("case", NORM_FUSED)
def test_norms_that_are(case):
    made = fuse(Model(NORM_FUSED[case], {"w": 1 + drawn(16)}), [X[1]], ((0, 1),))
    assert [e.operator for e in made.done] == ["RMSNormalization"], made.said
    check(made, [[x] for x in X])
