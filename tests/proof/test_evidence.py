"""What a proof rests on is kept, and can be read; and a fusion rounds no worse than the model does."""

from __future__ import annotations

import json

import torch

from fxfuse.proof.evidence import BreakEvidence, Evidence
from tests.proof.kinds import QKV, Model, attend, drawn, fuse, normed, qkv, rows


def test_it_is_one_line() -> None:
    evidence = Evidence(
        draws=3,
        sizes=({"s0": 3}, {"s0": 1}),
        magnitudes=(1.0, 1e-6),
        breaks=(BreakEvidence("clamp@m.py:3", ("below",), {"above": "the type ends"}),),
        claims=("causal at every length (z3)",),
        error=0.25,
        accepted=("clamp@m.py:4",),
    )
    said = str(evidence)
    assert said.startswith("3 draws at 1e-06 … 1, 2 sizes, off by 0.25 of rounding; breaks: clamp@m.py:3")
    assert "above cannot be: the type ends" in said and "causal" in said and "accepted: clamp@m.py:4" in said
    assert json.loads(json.dumps(evidence.to_dict()))["breaks"][0]["name"] == "clamp@m.py:3"


def attention(scores):
    return fuse(Model(lambda q, k, v: attend(q, k, v, lambda s: scores(s, q.shape[2])), {}), qkv(), QKV)


def test_what_was_read_and_how_it_was_decided() -> None:
    (entry,) = attention(lambda s, S: s.masked_fill(rows(S)[1] > rows(S)[0], -1e9)).done
    assert entry.evidence.draws >= 4 and len(entry.evidence.sizes) >= 2
    assert min(entry.evidence.magnitudes) <= 1e-6 and max(entry.evidence.magnitudes) >= 1e3
    assert any("causal at every length" in claim for claim in entry.evidence.claims)
    assert any("masks with -1e+09" in said for said in entry.evidence.differences)


def test_a_piece_that_cannot_run_is_named_with_its_rule() -> None:
    (entry,) = attention(lambda s, S: s.clamp(min=torch.finfo(torch.float32).min)).done
    (found,) = entry.evidence.breaks
    assert found.name.startswith("clamp@") and "below" in found.beyond


def test_what_the_caller_accepts_is_said() -> None:
    model = Model(lambda q, k, v: attend(q, k, v, lambda s: s.clamp(-5e4, 5e4)), {})
    refused = fuse(model, qkv(), QKV)
    (entry,) = refused.entries
    assert entry.status == "refused" and "clamp@" in entry.reason
    name = next(word.strip("():,.;") for word in entry.reason.split() if "clamp@" in word)
    accepted = fuse(model, qkv(), QKV, accept=[name])
    assert accepted.done and name in accepted.done[0].evidence.accepted


def test_it_rounds_as_the_model_does() -> None:
    """In its own type to a few units; where the model rounds on the way, it is not fused or rounds alike."""
    x = drawn(2, 6, 16).bfloat16()

    def fused(function):
        return fuse(Model(function, {"w": (1 + drawn(16)).bfloat16()}), [x], ((0, 1),))

    (entry,) = fused(lambda x, w: (normed(x.float(), 1.0)).to(x.dtype) * w).done
    assert entry.evidence.rounding <= 4
    coarse = fuse(Model(lambda x, w: normed(x.bfloat16().float(), w), {"w": 1 + drawn(16)}), [x.float()], ((0, 1),))
    for entry in coarse.done:  # the cast may lie before the region
        assert entry.evidence.rounding <= 4
    inside = fuse(
        Model(
            lambda x, w: x * torch.rsqrt(x.square().mean(-1, True).bfloat16().float() + 1e-6) * w, {"w": 1 + drawn(16)}
        ),
        [x.float()],
        ((0, 1),),
    )
    assert not inside.done
