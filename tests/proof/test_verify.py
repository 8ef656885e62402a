"""A fused program is proven against its original again."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import fxfuse
from fxfuse.recognise.catalogue import shipped
from tests.proof.programs_to_verify import PROGRAMS, calls, flex, fused, masked, original, tanh_gelu


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


# ---- what is legitimate


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("options", [{}, {"opset": 23}, {"opset": 25, "frozen": True}], ids=str)
def test_a_fusion_is_proven_again(name: str, options: dict[str, Any]) -> None:
    found = fxfuse.verify(original(name), fxfuse.fuse(original(name), **options))
    expected = PROGRAMS[name][1] - ({"TensorScatter"} if options.get("opset") == 23 else set())
    assert {region.operator for region in found.regions} == expected
    assert all(region.evidence is not None and region.nodes and region.source for region in found.regions)
    for operator in expected:
        (line,) = [line for line in str(found).splitlines() if line.startswith(operator)]
        assert "draws" in line or line.endswith(":")


@pytest.mark.parametrize("name", PROGRAMS)
def test_so_it_is_after_files(name: str) -> None:
    if name.startswith("flex"):
        pytest.skip("torch cannot save a flex_attention")
    both = [through_a_file(p) for p in (original(name), fused(name))]
    assert {region.operator for region in fxfuse.verify(*both).regions} == PROGRAMS[name][1]
    assert fxfuse.verify(original(name), both[1]).operators == fxfuse.verify(both[0], fused(name)).operators


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_itself(name: str) -> None:
    found = fxfuse.verify(original(name), original(name))
    assert not found.regions and not found.operators and found.kept
    assert "verified" in str(found)


@pytest.mark.parametrize("name", ["llama", "a window", "growing cache", "static cache, functional", "under no_grad"])
@pytest.mark.parametrize(
    "only", [[], ["rms_norm"], ["rotary_embedding"], ["attention"], ["attention", "rms_norm"]], ids=str
)
def test_some_patterns_only(name: str, only: list[str]) -> None:
    patterns = {p.name: p for p in shipped()}
    program = fxfuse.fuse(original(name), patterns=[patterns[n] for n in only])
    found = fxfuse.verify(original(name), program)
    assert found.operators == dict(
        sorted(fxfuse.report(program).counts.items(), key=lambda i: list(found.operators).index(i[0]))
    )


def test_what_buffers_hold_is_said_to_count() -> None:
    program = original("a mask in a buffer")
    frozen = fxfuse.fuse(program, frozen=True)
    (node,) = calls(frozen, "attention")
    assert node.kwargs["is_causal"] == 1 and "persistent buffers" in str(fxfuse.verify(program, frozen))
    assert "persistent buffers" not in str(fxfuse.verify(program, fxfuse.fuse(program)))


def test_what_is_written_out_in_primitives_is_said() -> None:
    found = fxfuse.verify(original("flex, primitives"), fused("flex, primitives"))
    assert [region.decomposed for region in found.regions] == [True] and not found.operators
    assert "written out in primitives" in str(found)


@pytest.mark.parametrize(
    "options", [{"windows": "attributes", "opset": 25}, {"flex_attention": "preview_only"}], ids=str
)
def test_other_forms_of_flex_attention(options: dict[str, Any]) -> None:
    program = flex("sliding window")()
    assert fxfuse.verify(program, fxfuse.fuse(program, **options)).regions


def test_a_pattern_that_is_not_registered_is_passed() -> None:
    pattern, program = tanh_gelu("tanh")
    done = fxfuse.fuse(program, patterns=[pattern])
    assert len(fxfuse.report(done).fused()) == 1
    assert len(fxfuse.verify(program, done, patterns=[pattern]).regions) == 1
    with pytest.raises(fxfuse.ParityError, match="aten::gelu"):
        fxfuse.verify(program, done)


def test_symbols_may_have_other_names() -> None:
    one, two = masked("keys"), masked("length")
    assert fxfuse.verify(one, fxfuse.fuse(two)).operators == {"Attention": 1}
    with pytest.raises(fxfuse.ParityError, match=r"range|demand"):
        fxfuse.verify(one, fxfuse.fuse(masked("length", 9)))


def test_bad_input() -> None:
    for pair in ((fused("llama"), original("llama")), (None, fused("llama")), (original("llama"), 3)):
        with pytest.raises(fxfuse.FxfuseError) as caught:
            fxfuse.verify(*pair)
        assert not isinstance(caught.value, fxfuse.ParityError)
