"""The machinery of `create_block_mask` in `forward` goes with the attention that read it; a live vmap stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxfuse
from fxfuse.graph.dead_vmap import brackets
from tests.patterns.flex_attention.models import Attention, MaskInside, MaskInsideCausal, documents, inputs


class UsersVmap(Attention):
    """A vmap of the model's own, before, around and after the mask's."""

    def forward(self, x, ids):
        b, s, _ = x.shape
        norms = torch.vmap(lambda row: row / row.norm())(x)
        mask = create_block_mask(documents(ids), b, None, s, s, device=x.device)
        y = flex_attention(*self.qkv(norms), block_mask=mask)
        return torch.vmap(lambda row: row.cumsum(-1))(y)


class ListsRead(Attention):
    """The model reads the mask's lists too."""

    def forward(self, x, ids):
        b, s, _ = x.shape
        mask = create_block_mask(documents(ids), b, None, s, s, device=x.device)
        return flex_attention(*self.qkv(x), block_mask=mask) * mask.kv_num_blocks.sum()


class DeadVmap(nn.Module):
    """What was dead before has nothing to do with the attention, and stays."""

    def forward(self, x, ids):
        torch.vmap(lambda row: row.sin())(x)
        q = x[:, None]
        return flex_attention(q, q + 1, q * 2)


def plain(model, args):
    with torch.no_grad():
        return torch.export.export(model, args)


def targets(program):
    return {str(getattr(n.target, "__name__", n.target)) for n in program.graph.nodes if n.op == "call_function"}


def same(program, model, args):
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args), model(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [MaskInside, MaskInsideCausal], ids=lambda m: m.__name__)
def test_nothing_of_the_machinery_is_left(model):
    module, args = model(), inputs(2, 140)
    fused = fxfuse.fuse(plain(module, args))
    assert [e.status for e in fxfuse.report(fused)] == ["fused"]
    assert brackets(fused.graph) == []
    left = targets(fused)
    assert not any(word in name for name in left for word in ("vmap", "batch_dim", "argsort", "index_put", "assert"))
    same(fused, module, args)


def test_the_models_own_vmap_is_untouched():
    module, args = UsersVmap(), inputs(2, 140)
    fused = fxfuse.fuse(plain(module, args))
    assert len(brackets(fused.graph)) == 2
    assert not any("argsort" in name for name in targets(fused))
    same(fused, module, args)


def test_what_the_model_reads_is_kept():
    module, args = ListsRead(), inputs(2, 140)
    fused = fxfuse.fuse(plain(module, args))
    assert len(brackets(fused.graph)) == 4  # the mask function's; those of the lists by query are gone
    same(fused, module, args)


def test_what_was_dead_before_stays():
    module, args = DeadVmap(), inputs(2, 12)
    with torch.no_grad():
        program = torch.export.export(module, args)
    fused = fxfuse.fuse(program)
    assert len(brackets(fused.graph)) == 1
    same(fused, module, args)
