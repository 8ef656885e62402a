"""flex_attention as FlexAttention of ai.onnx.preview, on request: one node, its mods within, its captures without.

No runtime has the operator: onnx's reference evaluator runs it through its function body, which `onnx.inliner` inlines
together with the mods, against eager flex_attention.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
import torch._dynamo
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxfuse
import fxfuse.onnx
from fxfuse.errors import FxfuseError
from fxfuse.parity import check_onnx
from tests.patterns.flex_attention import checks
from tests.patterns.flex_attention.idioms import IDIOMS, INF, Entry
from tests.patterns.flex_attention.test_hostile import NOT_ATTENTION
from tests.patterns.flex_attention.test_hostile import program as hostile

FREE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
OPERATOR = ("ai.onnx.preview", "FlexAttention")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Model(nn.Module):
    """`call` is given the model, whose buffers mods capture."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, q, k, v, ids=None):
        return self.call(self, q, k, v) if ids is None else self.call(self, q, k, v, ids)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def qkv(batch, length, keys=None, kv_heads=2, v_size=12, dtype=torch.float32):
    keys = keys or length
    shapes = ((batch, 4, length, 8), (batch, kv_heads, keys, 8), (batch, kv_heads, keys, v_size))
    return tuple(normal(*s, dtype=dtype) for s in shapes)


def export(model, args, *, dynamic=True, flex_attention="preview", **options):
    shapes = tuple(FREE if t.dim() == 4 else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for t in args) if dynamic else None
    return fxfuse.onnx.export(model.eval(), args, dynamic_shapes=shapes, flex_attention=flex_attention, **options)


def nodes(onnx_program):
    return [n for n in onnx_program.model_proto.graph.node if (n.domain, n.op_type) == OPERATOR]


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def run(onnx_program, args):
    """By ONNX's reference, the operator's body inlined; the checker has to accept both."""
    check_onnx(onnx_program)
    model = onnx_program.model_proto
    inlined = onnx.inliner.inline_selected_functions(model, [OPERATOR], inline_schema_functions=True)
    onnx.checker.check_model(inlined)
    assert not any(n.op_type == "FlexAttention" for n in inlined.graph.node)
    feeds = {i.name: t.numpy() for i, t in zip(inlined.graph.input, args, strict=True)}
    with np.errstate(invalid="ignore"):  # its softmax of a row of -inf
        return [torch.from_numpy(y) for y in ReferenceEvaluator(inlined).run(None, feeds)]


def same(onnx_program, model, *inputs, atol=1e-5):
    for args in inputs:
        with torch.no_grad():
            expected = model(*args)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(run(onnx_program, args), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=atol)


# ---- the catalogue


def name(entry):
    return entry.define.__name__


def agrees(entry, *, dynamic, flex_attention):
    """One node and, but for log-sum-exps, nothing else; what eager computes, at two shapes."""
    captured = checks.program(entry, dynamic=dynamic)
    onnx_program = fxfuse.onnx.export(captured, flex_attention=flex_attention)
    count = Counter(n.op_type for n in onnx_program.model_proto.graph.node)
    one_node = flex_attention == "preview_only" or not entry.whole
    assert count["FlexAttention"] == one_node
    assert count["Attention"] == (not one_node)
    if "log-sum" not in entry.name and "sink" not in entry.name and one_node:
        assert sum(count.values()) == 1
    shapes = checks.SHAPES.values() if dynamic else [checks.SHAPES["exported"]]
    # A squared score is a large one, and the body multiplies both q and k with the scale's root.
    atol = 3e-5 if name(entry) == "squared" else 1e-5
    same(onnx_program, entry.model(), *(checks.inputs(entry, *shape) for shape in shapes), atol=atol)


SAMPLE = {"padded_both": "preview_only"}
"""The rest are slow tests."""


@pytest.mark.parametrize("entry", [e for e in IDIOMS if name(e) in SAMPLE], ids=name)
def test_one_of_each_kind(entry):
    agrees(entry, dynamic=True, flex_attention=SAMPLE[name(entry)])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("entry", [e for e in IDIOMS if not e.whole], ids=name)
def test_what_is_no_attention(entry, dynamic):
    agrees(entry, dynamic=dynamic, flex_attention="preview")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("entry", IDIOMS, ids=name)
def test_every_idiom_where_that_alone_is_asked_for(entry, dynamic):
    agrees(entry, dynamic=dynamic, flex_attention="preview_only")


@pytest.mark.slow
@pytest.mark.parametrize("define", NOT_ATTENTION.values(), ids=NOT_ATTENTION)
def test_hostile_mods(define):
    model, captured = hostile(define)
    onnx_program = fxfuse.onnx.export(captured, flex_attention="preview")
    assert len(nodes(onnx_program)) <= 1
    entry: Entry = SimpleNamespace(mods=SimpleNamespace(kv_heads=4, v_size=8))
    for batch, length in ((2, 9), (3, 21)):
        args = checks.inputs(entry, batch, length)
        (ours,), theirs = run(onnx_program, args), model(*args)
        # A row whose scores are NaN is nothing here, and NaN there.
        torch.testing.assert_close(ours[~theirs.isnan()], theirs[~theirs.isnan()], rtol=1e-4, atol=3e-5)


# ---- what is within the node, and what is not


def documents(m, q, k, v, ids):
    """Squared scores with a bias, within documents; query 2 sees nothing."""

    def mod(s, b, h, i, j):
        return torch.where((i >= j) & (ids[b, i] == ids[b, j]) & (i != 2), s * s + m.slopes[h] * (i - j), -INF)

    return flex_attention(q, k, v, score_mod=mod, enable_gqa=True)


def ids(batch, length):
    return torch.arange(batch * length).view(batch, length) // 4


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow, id="static"), True])
def test_captured_tensors_grouped_heads_and_rows_that_see_nothing(dynamic):
    model, args = Model(documents), (*qkv(2, 9), ids(2, 9))
    onnx_program = export(model, args, dynamic=dynamic)
    assert [n.op_type for n in onnx_program.model_proto.graph.node] == ["FlexAttention"]
    (node,) = nodes(onnx_program)
    opsets = {o.domain: o.version for o in onnx_program.model_proto.opset_import}
    assert opsets == {"": 24, "ai.onnx.preview": 1}
    found = attributes(node)
    assert list(node.input) == ["q", "k", "v"] and found["scale"] == pytest.approx(8**-0.5)
    mod = found["score_mod"]
    assert len(mod.input) == len(mod.output) == len(found["prob_mod"].input) == 1
    operators = Counter(n.op_type for n in mod.node)
    assert operators["Range"] == 4, "b, h, q and kv are made of the score's shape"
    assert "ids" in {i for n in mod.node for i in n.input}, "the tensor is captured from outside"
    (row,) = {o for n in mod.node for o in n.output} & {mod.output[0].name}
    assert [d.dim_value for d in mod.input[0].type.tensor_type.shape.dim][1] == 4 and row
    same(onnx_program, model, args, *([(*qkv(3, 14), ids(3, 14))] if dynamic else []))


def test_what_mods_capture_is_computed_outside():
    """Document ids of a sum over q: the sum is no part of the mod. Sizes are captured too."""

    def call(m, q, k, v):
        seen = (q.sum((1, 3)) > 0).cumsum(1)

        def mod(s, b, h, i, j):
            return torch.where((seen[b, i] == seen[b, j]) & (j < k.shape[2] - 1), s.clamp(-1, 1), -INF)

        return flex_attention(q, k, v, score_mod=mod, enable_gqa=True)

    model, args = Model(call), qkv(2, 9)
    onnx_program = export(model, args)
    (node,) = nodes(onnx_program)
    inside = {n.op_type for n in attributes(node)["score_mod"].node}
    outside = {n.op_type for n in onnx_program.model_proto.graph.node}
    assert {"CumSum", "ReduceSum"} <= outside and not {"CumSum", "ReduceSum"} & inside and "Clip" in inside
    same(onnx_program, model, args, qkv(3, 14))


def test_layers_and_calls_that_share():
    """A mask for all layers, and one q and k with two mods: each node has its own mod, nothing is left outside."""

    def call(m, q, k, v):
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 4), None, None, q.shape[2], k.shape[2], "cpu")
        squared = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * s, block_mask=mask, enable_gqa=True)
        clamped = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s.clamp(-1, 1), enable_gqa=True)
        mixed = squared + clamped
        return flex_attention(mixed, k, v, score_mod=lambda s, b, h, i, j: s * s, block_mask=mask, enable_gqa=True)

    model, args = Model(call), qkv(2, 9, v_size=8)
    onnx_program = export(model, args)
    count = Counter(n.op_type for n in onnx_program.model_proto.graph.node)
    assert count == {"FlexAttention": 3, "Add": 1}
    names = [o for n in nodes(onnx_program) for a in attributes(n).values() if hasattr(a, "node") for o in a.node]
    names = [o for n in names for o in n.output] + [o for n in onnx_program.model_proto.graph.node for o in n.output]
    assert len(names) == len(set(names))
    same(onnx_program, model, args, qkv(3, 14, v_size=8), atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_other_types(dtype):
    """float16 scores are float32 ones, as flex_attention has them: q, k and v are cast outside."""
    model, args = Model(documents).to(dtype), (*qkv(2, 9, dtype=dtype), ids(2, 9))
    onnx_program = export(model, args)
    assert len(nodes(onnx_program)) == 1
    exact = Model(documents).double()(*(a.double() if a.is_floating_point() else a for a in args))
    (ours,), theirs = run(onnx_program, args), model(*args)
    assert ours.dtype == dtype
    # The scale is a float32 attribute, whatever the inputs are.
    bound = 1e-6 if dtype == torch.float64 else 1.5 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps
    assert (ours.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("scale", [-0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_scales_that_have_no_root(scale):
    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * s + s + j, scale=scale)

    model, args = Model(call), qkv(2, 5, 7, kv_heads=4)
    same(export(model, args), model, args, qkv(3, 9, 4, kv_heads=4))


@pytest.mark.slow
def test_a_mod_that_forgets_the_score():
    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: m.slopes[h] * (i - j) + 0.0)

    model, args = Model(call), qkv(2, 5, kv_heads=4)
    onnx_program = export(model, args, flex_attention="preview_only")
    assert len(nodes(onnx_program)) == 1
    same(onnx_program, model, args, qkv(3, 9, kv_heads=4))


# ---- what it cannot say


def test_log_sum_exp_is_computed_beside_it():
    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s.sigmoid(), return_lse=True)

    model, args = Model(call), qkv(2, 9, kv_heads=4)
    onnx_program = export(model, args)
    report = fxfuse.report(onnx_program)
    assert report.counts == {"FlexAttention": 1}
    (entry,) = report.decomposed()
    assert "logsumexp is no output" in (entry.reason or "")
    same(onnx_program, model, args, qkv(3, 14, kv_heads=4))


def test_a_function_of_nothing_is_written_out():
    """All scores 1: there is no function of scores to give."""

    def call(m, q, k, v):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.ones_like(s))

    model, args = Model(call), qkv(2, 5, kv_heads=4)
    onnx_program = export(model, args, flex_attention="preview_only")
    assert fxfuse.report(onnx_program).counts == {} and not nodes(onnx_program)
    same(onnx_program, model, args, qkv(3, 9, kv_heads=4))


# ---- the doors


def squared(m, q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i > j, s * s, -INF), enable_gqa=True)


@pytest.mark.parametrize("optimize", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_plain_export(optimize, kv_heads):
    """torch optimises what the plugin hands back, the mods too. It asks of no size whether it is 1."""
    model, args = Model(squared).eval(), qkv(2, 9, kv_heads=kv_heads)
    options = {"dynamo": True, "opset_version": 24, "dynamic_shapes": (FREE,) * 3, "verbose": False}
    with fxfuse.onnx.enabled(flex_attention="preview"):
        onnx_program = torch.onnx.export(model, args, optimize=optimize, **options)
    assert fxfuse.report(onnx_program).counts == {"FlexAttention": 1}
    assert len(nodes(onnx_program)) == 1
    same(onnx_program, model, args, qkv(3, 14, kv_heads=kv_heads))
    with fxfuse.onnx.enabled():
        plain = torch.onnx.export(model, args, optimize=optimize, **options)
    assert not nodes(plain) and fxfuse.report(plain).decomposed("Attention")
    same(plain, model, args, qkv(3, 14, kv_heads=kv_heads))


def test_a_fused_program_runs_saves_trains_and_goes_back(tmp_path):
    model, args = Model(squared).eval(), qkv(2, 9)
    export = fxfuse.prepass(torch.export.export, flex_attention="preview")
    fused = export(model, args, dynamic_shapes=(FREE,) * 3)
    assert "the score times itself" in str(fxfuse.report(fused))
    torch.export.save(fused, tmp_path / "fused.pt2")
    loaded = torch.export.load(tmp_path / "fused.pt2")
    other = qkv(3, 14)
    for program in (fused, loaded, fxfuse.unfuse(fused)):
        torch.testing.assert_close(program.module()(*other), model(*other))
    assert len(nodes(fxfuse.onnx.export(loaded))) == 1
    q = other[0].clone().requires_grad_()
    fused.module()(q, *other[1:]).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    with pytest.raises(FxfuseError, match="fused already"):
        fxfuse.fuse(fused)


@pytest.mark.parametrize(
    "door",
    [
        lambda **options: fxfuse.fuse(torch.export.export(nn.ReLU(), (torch.ones(2),)), **options),
        lambda **options: fxfuse.onnx.export(nn.ReLU().eval(), (torch.ones(2),), **options),
        lambda **options: fxfuse.onnx.install(**options),
        lambda **options: fxfuse.prepass(nn.ReLU(), **options),
    ],
    ids=["fuse", "export", "install", "prepass"],
)
@pytest.mark.parametrize("option", ["flex_attention", "windows"])
def test_unknown_options_are_refused(door, option):
    with pytest.raises(FxfuseError, match=f"unknown {option}='no such'"):
        door(**{option: "no such"})
