"""The program that the caller passes is the same afterwards: graphs, metadata, weights, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import fxfuse
import fxfuse.onnx
from fxfuse.patterns.rms_norm import PATTERN as RMS_NORM
from fxfuse.recognise.answers import Proposal
from tests.unchanged import left_as_it_was

from .models import Dead, Layer, NormOfHalf, Untouched, captured, half, heads, off


class Nested(nn.Module):
    """Autocast within autocast, in a submodule of a submodule of the program."""

    def forward(self, x: Tensor) -> Tensor:
        with off():
            with half():
                y = x @ x.transpose(-1, -2)
            z = y.float()
        return z + 1


class Flexible(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j))


def decoder() -> ExportedProgram:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            with half():
                return self.model(ids, use_cache=False).logits

    return captured(Logits(), torch.tensor([[1, 2, 3], [4, 5, 6]]))


def flexible() -> ExportedProgram:
    with fxfuse.flex_capture():
        return captured(Flexible(), *heads())


PROGRAMS: dict[str, Callable[[], ExportedProgram]] = {
    "a layer": lambda: captured(Layer(), *heads()),
    "no_grad": lambda: captured(Layer(torch.no_grad), *heads()),
    "autocast off": lambda: captured(Layer(off), *heads()),
    "autocast on": lambda: captured(Layer(half), *heads()),
    "autocast in autocast": lambda: captured(Nested(), torch.randn(2, 5, 16)),
    "off in on": lambda: captured(NormOfHalf(), torch.randn(2, 5, 16), torch.randn(16, 16)),
    "nothing to fuse in the blocks": lambda: captured(Untouched(), torch.randn(2, 5, 16)),
    "written in place": lambda: captured(Dead(), torch.randn(2, 5, 16)),
    "flex_attention": flexible,
    "a decoder under autocast": decoder,
}
FEW = ["autocast in autocast", "no_grad", "written in place"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_by_fuse(name: str) -> None:
    program = PROGRAMS[name]()
    with left_as_it_was(program):
        fused = fxfuse.fuse(program)
    assert not {id(m) for m in fused.graph_module.modules()} & {id(m) for m in program.graph_module.modules()}


class Raises:
    name, operator, since_opset = "raises", "Raises", 23

    def propose(self, view: Any, ask: Any) -> Any:
        raise ValueError("no")

    recognise = propose


class Tears:
    """It proposes what a norm does, and its replacement does not fit."""

    name, operator, since_opset = "tears", "Tears", 23

    def propose(self, view: Any, ask: Any) -> Any:
        for proposal in RMS_NORM.propose(view, ask):
            yield Proposal(proposal.anchor, proposal.regions)

    def recognise(self, region: Any, ask: Any) -> Any:
        return RMS_NORM.recognise(region, ask)


@pytest.mark.parametrize("name", FEW)
def test_by_patterns_that_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = PROGRAMS[name]()

    def fails(self: Any, *_: Any) -> None:
        raise ValueError("halfway")

    with left_as_it_was(program):
        fxfuse.fuse(program, patterns=[Raises(), RMS_NORM])
        monkeypatch.setattr("fxfuse.graph.splice.Splicer.finish", fails)
        fxfuse.fuse(program, patterns=[Tears(), RMS_NORM])


@pytest.mark.parametrize("name", FEW)
def test_by_the_doors(name: str) -> None:
    program = PROGRAMS[name]()
    with left_as_it_was(program):
        fused = fxfuse.fuse(program)
        fxfuse.verify(program, fused)
        fxfuse.unfuse(fused)
        if name != "written in place":
            fxfuse.onnx.export(program)
            with fxfuse.onnx.enabled():
                torch.onnx.export(program, dynamo=True, opset_version=24, verbose=False)


def test_the_fused_program_is_its_own() -> None:
    """To fuse, change or delete what came out takes nothing from what went in."""
    program = captured(Layer(torch.no_grad, off), *heads())
    with left_as_it_was(program):
        fused = fxfuse.fuse(program, patterns=[])
        for module in list(fused.graph_module.modules()):
            for node in reversed(list(getattr(module, "graph", torch.fx.Graph()).nodes)):
                node.meta.clear()
        fused.graph_module.delete_all_unused_submodules()
        for name, _ in list(fused.graph_module.named_children()):
            delattr(fused.graph_module, name)


def test_f_rms_norm_is_still_torchs() -> None:
    """Nothing of torch stays patched."""
    before = F.rms_norm, torch.export.export, torch.onnx.export
    fxfuse.fuse(PROGRAMS["no_grad"]())
    assert (F.rms_norm, torch.export.export, torch.onnx.export) == before
