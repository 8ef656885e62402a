"""A call that cannot be fused stops an export through every door: with its node, its line, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.attention.flex_attention as torch_flex
from torch.utils import _pytree as pytree

import fxfuse
import fxfuse.onnx
from tests.patterns.flex_attention.models import Attention, causal, documents, inputs

BLOCK = 16


class ListsOfAnother(Attention):
    """Block lists of documents, a mask function of more than them."""

    def forward(self, x, ids):
        s = x.shape[1]
        first = torch.tensor([[[1, 1, 1]]], dtype=torch.int32), torch.zeros(1, 1, 3, 3, dtype=torch.int32)
        mask = torch_flex.BlockMask.from_kv_blocks(*first, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(s, s))
        return torch_flex.flex_attention(*self.qkv(x), block_mask=mask)  # the lists


class WholeRow(Attention):
    """A score that reads a whole row of a table, in an order that depends on it."""

    def forward(self, x, ids):
        table = self.projection.weight

        def score(s, b, h, i, j):
            return s + table[h].sort().values[0]

        return torch_flex.flex_attention(*self.qkv(x), score_mod=score)  # the row


REFUSED = {
    ListsOfAnother: ("the function keeps it, and it is in no block that is listed", "# the lists"),
    WholeRow: ("with a mod that cannot be read: it calls aten.sort", "# the row"),
}
TORCH = {"dynamo": True, "opset_version": 24, "verbose": False}


def installed(model, args, path):
    fxfuse.onnx.install()
    try:
        torch.onnx.export(model, args, path, **TORCH)
    finally:
        fxfuse.onnx.uninstall()


def enabled(model, args, path):
    with fxfuse.onnx.enabled():
        torch.onnx.export(model, args, path, **TORCH)


def enabled_program(model, args, path):
    with fxfuse.onnx.enabled():
        with fxfuse.flex_capture():
            program = torch.export.export(model, args)
        torch.onnx.export(program, f=path, **TORCH)


def marked(model, args, path):
    enabled(fxfuse.prepass(model, opset=24), args, path)


def captured(model, args, path):
    program = fxfuse.prepass(torch.export.export)(model, args)
    assert [e.status for e in fxfuse.report(program)] == ["near miss"]
    fxfuse.onnx.export(program, f=path)


def exported(model, args, path):
    fxfuse.onnx.export(model, args, path)


def patched():
    from torch.onnx._internal.exporter import _core

    operator = torch.ops.higher_order.flex_attention
    return (
        torch.onnx.export,
        _core.export,
        _core._prepare_exported_program_for_export,
        _core._exported_program_to_onnx_program,
        torch_flex.create_block_mask.__code__,
        torch_flex._create_empty_block_mask,
        torch_flex._validate_device,
        torch_flex.setup_compilation_env,
        dict(operator.py_kernels),
        torch_flex.BlockMask in pytree.SUPPORTED_NODES,
    )


@pytest.mark.parametrize("door", [installed, enabled, enabled_program, marked, captured, exported])
@pytest.mark.parametrize("model", REFUSED, ids=lambda m: m.__name__)
def test_is_an_error_that_says_where(model, door, tmp_path):
    torch._dynamo.reset()
    module, args, before = model().eval(), inputs(2, 40), patched()
    why, line = REFUSED[model]
    with torch.no_grad(), pytest.raises(fxfuse.FxfuseError) as caught:
        door(module, args, tmp_path / "model.onnx")
    assert why in caught.value.what
    assert caught.value.where.startswith("flex_attention, test_refused.py:") and caught.value.where.endswith(line)
    assert list(tmp_path.iterdir()) == []
    assert patched() == before


def test_the_callers_own_translation_is_not_in_the_way():
    """Who translates the operator is not stopped: what happens then is torch's."""
    torch._dynamo.reset()
    own = {torch.ops.higher_order.flex_attention: lambda *args, **kwargs: None}
    with torch.no_grad(), fxfuse.onnx.enabled(), pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(ListsOfAnother().eval(), inputs(2, 40), custom_translation_table=own, **TORCH)


def test_what_is_not_refused_goes_on(tmp_path):
    """The same process, the same doors."""
    torch._dynamo.reset()

    class Documents(Attention):
        def forward(self, x, ids):
            b, s, _ = x.shape
            mask = torch_flex.create_block_mask(documents(ids), b, None, s, s, device=x.device)
            return torch_flex.flex_attention(*self.qkv(x), block_mask=mask)

    with torch.no_grad():
        enabled(Documents().eval(), inputs(2, 40), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()
