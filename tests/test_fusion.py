"""The story: what fuse changes, what it leaves, and what it says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

import fxfuse
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM


class Block(nn.Module):
    """A norm, a gate, and an attention with shared key heads; `keep` is left alone."""

    def __init__(self, dim: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, kv_heads * self.size)
        self.v = nn.Linear(dim, kv_heads * self.size)
        self.register_buffer("counter", torch.zeros(1))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = self.split(self.q(h), 4), self.split(self.k(h), 2), self.split(self.v(h), 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        keep = torch.sigmoid(x) * torch.tanh(h)
        return y.transpose(1, 2).flatten(2) + keep


def export(module: nn.Module, *inputs: torch.Tensor) -> ExportedProgram:
    dims = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)
    return torch.export.export(module.eval(), inputs, dynamic_shapes=dims, strict=False)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    return export(Block(), torch.randn(2, 5, 32))


def calls(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_each_meaning_becomes_one_op(program: ExportedProgram) -> None:
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RMSNormalization": 1, "Attention": 1}
    assert calls(fused).count("fxfuse.rms_norm.default") == calls(fused).count("fxfuse.attention.default") == 1
    assert not any("repeat_interleave" in c or "expand" in c for c in calls(fused))


@pytest.mark.parametrize("shape", [(2, 5, 32), (1, 3, 32), (4, 9, 32)])
def test_computes_the_same_at_other_shapes(program: ExportedProgram, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(fxfuse.fuse(program).module()(x), program.module()(x), rtol=1e-5, atol=1e-6)


def test_nodes_outside_the_regions_are_untouched(program: ExportedProgram) -> None:
    fused = fxfuse.fuse(program)
    consumed = {name for entry in fxfuse.report(fused) for name in entry.nodes}
    before = {n.name: n for n in program.graph.nodes}
    kept = [n for n in fused.graph.nodes if n.name in before and n.name not in consumed]
    stand_ins = {e.result for e in fxfuse.report(fused)}

    def spell(args: object) -> str:
        return repr(torch.fx.node.map_arg(args, lambda n: "fused" if n.name in stand_ins | consumed else n.name))

    names = {n.name for n in kept}
    outside = [n for n in program.graph.nodes if n.name not in consumed]
    gone = {n.name for n in outside} - names
    for node in outside:  # what is gone without being fused was read by fused regions only
        assert node.name in names or {u.name for u in node.users} <= consumed | gone
    assert [n.name for n in kept] == [n.name for n in outside if n.name in names], "the same order"
    assert {"sigmoid", "tanh", "linear", "linear_1", "linear_2"} <= {n.name for n in kept}
    for node in kept:
        original = before[node.name]
        assert node.target == original.target
        assert node.meta == original.meta
        if node.op == "call_function":
            assert spell((node.args, node.kwargs)) == spell((original.args, original.kwargs))


def test_the_callers_program_is_not_changed(program: ExportedProgram) -> None:
    code, signature = program.graph_module.code, copy.deepcopy(program.graph_signature)
    state = torch.random.get_rng_state()
    fxfuse.fuse(program)
    assert program.graph_module.code == code
    assert program.graph_signature == signature
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_size_is_specialised(program: ExportedProgram) -> None:
    fused = fxfuse.fuse(program)
    assert fused.range_constraints == program.range_constraints
    fake = next(n.meta["val"] for n in fused.graph.nodes if n.op == "placeholder" and n.name == "x")
    assert isinstance(fake.shape[0], torch.SymInt) and isinstance(fake.shape[1], torch.SymInt)


def test_the_report_says_what_and_where(program: ExportedProgram) -> None:
    report = fxfuse.report(fxfuse.fuse(program))
    (norm,) = report.fused("RMSNormalization")
    assert norm.parameters == {"epsilon": 1e-6, "scale": "p_weight"}
    assert norm.source is not None and norm.source.startswith("test_fusion.py:") and "self.norm(x)" in norm.source
    (attention,) = report.fused("Attention")
    assert attention.parameters["kv_num_heads"] == 2 and attention.parameters["is_causal"] == 1
    assert report.nodes_after < report.nodes_before
    assert "RMSNormalization" in str(report) and "Attention" in str(report)
    assert pickle.loads(pickle.dumps(report)).counts == report.counts


def test_only_the_patterns_asked_for(program: ExportedProgram) -> None:
    assert fxfuse.report(fxfuse.fuse(program, patterns=[RMS_NORM])).counts == {"RMSNormalization": 1}


def test_verify_off_fuses_the_same(program: ExportedProgram) -> None:
    assert fxfuse.report(fxfuse.fuse(program, prove="off")).counts == fxfuse.report(fxfuse.fuse(program)).counts


def test_unfuse_gives_back_aten(program: ExportedProgram) -> None:
    plain = fxfuse.unfuse(fxfuse.fuse(program))
    assert not any(c.startswith("fxfuse") for c in calls(plain))
    x = torch.randn(3, 4, 32)
    torch.testing.assert_close(plain.module()(x), program.module()(x), rtol=1e-5, atol=1e-6)


def test_a_fused_program_saves_and_loads(program: ExportedProgram, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "fused.pt2"
    torch.export.save(fxfuse.fuse(program), path)
    loaded = torch.export.load(path)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(loaded.module()(x), program.module()(x), rtol=1e-5, atol=1e-6)


def test_values_read_elsewhere_stay_computed() -> None:
    class Shared(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return x * root * self.weight, root

    program = export(Shared(), torch.randn(2, 5, 32))
    fused = fxfuse.fuse(program)
    assert fxfuse.report(fused).counts == {"RMSNormalization": 1}
    x = torch.randn(3, 4, 32)
    for a, b in zip(fused.module()(x), program.module()(x), strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_is_fused_keeps_the_signature() -> None:
    class Norm(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    fused = fxfuse.fuse(export(Norm(), torch.randn(2, 5, 32)))
    assert fxfuse.report(fused).counts == {"RMSNormalization": 1}
    assert fused.graph_signature.user_outputs[0] == fxfuse.report(fused).entries[0].result
    x = torch.randn(3, 4, 32)
    torch.testing.assert_close(fused.module()(x), F.rms_norm(x, (32,), eps=1e-6) * fused.state_dict["weight"])


def test_in_place_arithmetic_is_read_and_what_is_not_fused_is_written_back() -> None:
    class InPlace(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.split(self.q(x), 4)
            k = self.split(self.k(x), 2).repeat_interleave(2, 1)
            q.mul_(0.3)
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ self.split(self.v(x), 2).repeat_interleave(2, 1)
            z = torch.exp(x)
            z.add_(1.0)
            return y.transpose(1, 2).flatten(2) * z

    program = export(InPlace(), torch.randn(2, 5, 32))
    fused = fxfuse.fuse(program)
    (entry,) = fxfuse.report(fused).fused("Attention")
    assert entry.parameters["scale"] == pytest.approx(0.3)
    assert "aten.add_.Tensor" in calls(fused) and "aten.mul_.Tensor" not in calls(fused)
    x = torch.randn(3, 4, 32)
    torch.testing.assert_close(fused.module()(x), program.module()(x), rtol=1e-5, atol=1e-6)


def test_a_write_between_is_never_moved_across() -> None:
    class Written(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            y = x + 1
            root = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            view = y.view(-1)
            view.mul_(2.0)
            return y * root * w

    program = torch.export.export(Written().eval(), (torch.randn(2, 8), torch.randn(8)), strict=False)
    fused = fxfuse.fuse(program)
    args = (torch.randn(2, 8), torch.randn(8))
    torch.testing.assert_close(fused.module()(*args), program.module()(*args))


@pytest.mark.parametrize("opset", [22, 26, "24", True, None])
def test_unsupported_opset(program: ExportedProgram, opset: object) -> None:
    with pytest.raises(fxfuse.FxfuseError, match="opset"):
        fxfuse.fuse(program, opset=opset)  # type: ignore[arg-type]


def test_bad_input(program: ExportedProgram) -> None:
    with pytest.raises(fxfuse.FxfuseError, match=r"expected a torch\.export\.ExportedProgram, got Block"):
        fxfuse.fuse(Block())  # type: ignore[arg-type]
    with pytest.raises(fxfuse.FxfuseError, match="fused already"):
        fxfuse.fuse(fxfuse.fuse(program))
    with pytest.raises(fxfuse.FxfuseError, match="prove"):
        fxfuse.fuse(program, prove="maybe")  # type: ignore[arg-type]
    with pytest.raises(fxfuse.FxfuseError, match="verify"):
        fxfuse.fuse(program, verify="maybe")
    with pytest.raises(fxfuse.FxfuseError, match="no fusion report"):
        fxfuse.report(program)
