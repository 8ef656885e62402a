"""What mods are read as, and the circumstances: types, heads, batches, lengths, captured sizes, many layers."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
import torch._dynamo
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxfuse
from fxfuse.patterns.flex_attention.calls import flex
from fxfuse.report.record import dumps, record, schema

INF = float("inf")
FREE = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},) * 3


class Model(nn.Module):
    """`call` is given the model, whose buffers mods capture."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, q, k, v):
        return self.call(self, q, k, v)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def fuse(model, args, dynamic_shapes=None):
    with fxfuse.flex_capture(), torch.no_grad():
        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
    return fxfuse.fuse(program)


def same(fused, model, args, atol=2e-6):
    with torch.no_grad():
        actual, expected = fused.module()(*args), model(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)
    assert actual.stride() == expected.stride()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def alibi(m, q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 40 * m.slopes[h] * (j - i))


def causal(m, q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -INF))


def squared(m, q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", [alibi, causal, squared], ids=lambda c: c.__name__)
def test_half_precision_rounds_as_flex_attention_does(call, dtype):
    """A bias of hundreds, rounded to 8 bits, would be off by one and more: it is added in float32."""
    model, args = Model(call).to(dtype), tuple(normal(2, 4, 30, 16, dtype=dtype) for _ in range(3))
    fused = fuse(model, args, FREE)
    exact = Model(call).double()(*(a.double() for a in args))
    with torch.no_grad():
        ours, theirs = ((f(*args).double() - exact).abs().max() for f in (fused.module(), model))
    assert ours <= 1.5 * theirs + torch.finfo(dtype).eps


def test_keys_of_batch_one_serve_every_query():
    def call(m, q, k, v):
        mask = create_block_mask(lambda b, h, i, j: i >= j, q.shape[0], None, 9, 9, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)

    model, args = Model(call), (normal(3, 4, 9, 16), normal(1, 4, 9, 16), normal(1, 4, 9, 16))
    fused = fuse(model, args)
    assert len(fxfuse.report(fused).fused("Attention")) == 1
    same(fused, model, args)


def test_a_factor_of_the_key_that_differs_among_heads_of_a_group():
    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * (m.slopes[h] * j + 1), enable_gqa=True)

    model, args = Model(call), (normal(3, 4, 9, 16), normal(3, 2, 9, 16), normal(3, 2, 9, 12))
    fused = fuse(model, args, FREE)
    (entry,) = fxfuse.report(fused).fused("Attention")
    assert entry.parameters["folded into K"] == "[1, H, 1, T]"
    same(fused, model, (normal(2, 4, 7, 16), normal(2, 2, 7, 16), normal(2, 2, 7, 12)))


@pytest.mark.parametrize(
    "seen",
    [lambda i, j, q, k: j <= i + (k.shape[2] - q.shape[2]), lambda i, j, q, k: j <= k.shape[2] // 2],
    ids=["bottom right", "half"],
)
def test_sizes_are_captured(seen):
    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(seen(i, j, q, k), s, -INF))

    model, args = Model(call), (normal(3, 4, 5, 16), normal(3, 4, 9, 16), normal(3, 4, 9, 16))
    fused = fuse(model, args, FREE)
    assert len(fxfuse.report(fused).fused("Attention")) == 1
    same(fused, model, (normal(2, 4, 4, 16), normal(2, 4, 11, 16), normal(2, 4, 11, 16)))


def test_tensors_computed_in_the_graph():
    def call(m, q, k, v):
        ids = (q.sum((1, 3)) > 0).cumsum(1)
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(ids[b, i] == ids[b, j], s, -INF))

    model, args = Model(call), tuple(normal(2, 4, 9, 16) for _ in range(3))
    fused = fuse(model, args, FREE)
    assert len(fxfuse.report(fused).fused("Attention")) == 1
    same(fused, model, tuple(normal(3, 4, 12, 16) for _ in range(3)))


def test_a_table_of_positions_that_is_an_argument():
    """Its length is a symbol of its own, and it is indexed with queries and with keys, whose lengths are others."""

    class Documents(Model):
        def forward(self, q, k, v, document):
            def mask(b, h, i, j):
                return (i >= j) & (document[b, i] == document[b, j])

            seen = create_block_mask(mask, q.shape[0], None, q.shape[2], q.shape[2], device="cpu")
            return flex_attention(q, k, v, block_mask=seen)

    model, args = Documents(None), (*(normal(2, 4, 9, 16) for _ in range(3)), torch.arange(18).view(2, 9) // 4)
    fused = fuse(model, args, (*FREE, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}))
    (entry,) = fxfuse.report(fused).fused("Attention")
    assert entry.parameters["is_causal"] and entry.parameters["boolean mask"] == "[B, 1, S, T]"
    same(fused, model, (*(normal(3, 4, 14, 16) for _ in range(3)), torch.arange(42).view(3, 14) // 5))


def test_integers_that_index_a_short_table():
    class Types(Model):
        def forward(self, q, k, v, kind):
            short = self.slopes[:2]
            return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + short[kind[b, j]])

    model, args = Types(None), (*(normal(2, 4, 9, 16) for _ in range(3)), torch.arange(18).view(2, 9) % 2)
    fused = fuse(model, args, (*FREE, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}))
    assert len(fxfuse.report(fused).fused("Attention")) == 1
    same(fused, model, (*(normal(3, 4, 14, 16) for _ in range(3)), torch.arange(42).view(3, 14) % 2))


def test_causal_is_top_left_where_lengths_differ():
    model = Model(causal)
    for sizes in ((5, 9), (9, 5)):
        args = tuple(normal(2, 4, n, 16) for n in (sizes[0], sizes[1], sizes[1]))
        fused = fuse(model, args)
        assert fxfuse.report(fused).fused("Attention")[0].parameters["is_causal"]
        same(fused, model, args)


def test_layers_share_one_mask():
    def call(m, q, k, v):
        for _ in range(3):
            mask = create_block_mask(
                lambda b, h, i, j: (i >= j) & (i - j < 4), None, None, q.shape[2], k.shape[2], "cpu"
            )
            q = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + m.slopes[h] * (j - i), block_mask=mask)
        return q

    model, args = Model(call), tuple(normal(2, 4, 9, 16) for _ in range(3))
    fused = fuse(model, args, FREE)
    attention = [n for n in fused.graph.nodes if n.target is torch.ops.fxfuse.attention.default]
    assert len(attention) == 3 and len({n.args[3] for n in attention}) == 1
    assert not any(flex(n) for n in fused.graph.nodes)
    same(fused, model, tuple(normal(3, 4, 14, 16) for _ in range(3)), atol=1e-5)


def test_a_long_sequence_is_asked_for_its_first_positions():
    """2,048 positions of 8 heads: their scores are not computed to prove what the mod means."""

    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where((i >= j) & (i - j < 9), s, -INF))

    model, args = Model(call), tuple(normal(1, 8, 2048, 8) for _ in range(3))
    fused = fuse(model, args)
    assert len(fxfuse.report(fused).fused("Attention")) == 1
    assert fxfuse.report(fused).seconds["prove"] < 5


def test_positions_before_heads_stay_so_in_memory():
    def call(m, q, k, v):
        y = flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), score_mod=lambda s, b, h, i, j: s * 2)
        return y.transpose(1, 2).flatten(2)

    model, args = Model(call), tuple(normal(2, 9, 4, 16) for _ in range(3))
    fused = fuse(model, args, ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) * 3)
    assert not any(n.target is torch.ops.aten.contiguous.default for n in fused.graph.nodes)
    same(fused, model, args)


def test_the_report_says_why_it_is_not_one_node():
    fused = fuse(Model(squared), tuple(normal(2, 4, 9, 16) for _ in range(3)), FREE)
    report = fxfuse.report(fused)
    (entry,) = report.decomposed("Attention")
    assert entry.reason == "the score times itself" and entry.result in {n.name for n in fused.graph.nodes}
    assert "1 decomposed" in str(report) and "decomposed: Attention: the score times itself" in str(report)
    assert report.counts == {}
    assert "decomposed" in report._repr_html_()
    jsonschema.validate(json.loads(dumps(record(report))), schema(), jsonschema.Draft202012Validator)


def test_what_cannot_be_read_stays_and_is_named():
    """Sorting a row that a position chooses is not read; sorting a captured table is."""

    def call(m, q, k, v):
        table = m.slopes.expand(4, 4)
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h].sort().values[0])

    def readable(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * m.slopes.sort().values[h])

    fused = fuse(Model(call), tuple(normal(2, 4, 9, 16) for _ in range(3)), FREE)
    (entry,) = fxfuse.report(fused).near_misses("Attention")
    assert "aten.sort" in (entry.reason or "")
    assert any(flex(n) for n in fused.graph.nodes)
    model, args = Model(readable), tuple(normal(2, 4, 9, 16) for _ in range(3))
    fused = fuse(model, args, FREE)
    assert len(fxfuse.report(fused).fused("Attention")) == 1
    same(fused, model, args)


def test_other_mods_are_other_regions():
    """Two calls that differ in a mod alone, and in a constant of it alone."""

    def call(m, q, k, v):
        q = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * torch.tensor(2.0))
        q = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * torch.tensor(3.0))
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s / 4)

    model, args = Model(call), tuple(normal(2, 4, 9, 16) for _ in range(3))
    fused = fuse(model, args, FREE)
    assert [e.parameters["scale"] for e in fxfuse.report(fused).fused("Attention")] == [0.5, 0.75, 0.0625]
    same(fused, model, args)
