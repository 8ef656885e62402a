"""Block lists are part of a mask's meaning: trusted, refused, or taken literally."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import fxfuse
import fxfuse.onnx
from fxfuse.patterns.flex_attention.capturing.lists import agrees
from tests.patterns.flex_attention.models import Attention, MaskGiven, MaskInside, causal, documents, inputs

S, BLOCK = 40, 16  # three rows of three blocks


def window(b, h, q, kv):
    return (q >= kv) & (q - kv < 17)


def lists(mask, **changed):
    """A mask's lists, some of them other ones, with its function."""
    own = {n: getattr(mask, n) for n in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")}
    return BlockMask.from_kv_blocks(
        **{**own, **changed}, BLOCK_SIZE=BLOCK, mask_mod=mask.mask_mod, seq_lengths=mask.seq_lengths
    )


def made(mask_mod, **options):
    return create_block_mask(mask_mod, None, None, S, S, device="cpu", BLOCK_SIZE=BLOCK, **options)


def with_function(mask, mask_mod):
    mask.mask_mod = mask_mod
    return mask


def indices(*rows):
    return torch.tensor(rows, dtype=torch.int32)[None, None]


AGREE = {
    "as it was made": lambda: made(window),
    "nothing is listed as full": lambda: made(causal, separate_full_blocks=False),
    "everything is listed": lambda: lists(
        made(causal),
        kv_num_blocks=indices(3, 3, 3),
        kv_indices=indices(*[[0, 1, 2]] * 3),
        full_kv_num_blocks=None,
        full_kv_indices=None,
    ),
    "another order": lambda: lists(
        made(causal, separate_full_blocks=False),
        kv_num_blocks=indices(1, 2, 3),
        kv_indices=indices([0, 1, 2], [1, 0, 2], [2, 0, 1]),
    ),
}
DIFFER = {
    "lists of another function": lambda: with_function(made(window), causal),
    "a block is missing": lambda: lists(made(causal), kv_num_blocks=indices(1, 1, 0)),
    "a full block is not full": lambda: lists(made(window), full_kv_num_blocks=indices(1, 1, 1)),
    "a window off by one": lambda: with_function(made(window), lambda b, h, q, kv: (q >= kv) & (q - kv <= 17)),
    "a block twice": lambda: lists(made(causal), kv_num_blocks=indices(1, 2, 1), kv_indices=indices(*[[0, 0, 0]] * 3)),
}  # fmt: skip


class Constant(Attention):
    """A mask that was made when the model was built: its lists are constants."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            if getattr(mask, name) is not None:
                self.register_buffer(name, getattr(mask, name))

    def forward(self, x):
        return flex_attention(*self.qkv(x), block_mask=self.mask)


def export(module, args):
    with fxfuse.flex_capture():
        return torch.export.export(module, args)


def statuses(program):
    return [e.status for e in fxfuse.report(program)]


def kernel(module, x, mask):
    """What the compiled kernel computes: blocks by the lists, the function inside partial ones only."""
    from fxfuse.patterns.flex_attention.capturing.lists import _positions, dense, membership

    kept = dense(mask.mask_mod, 1, 1, S, S)
    listed = _positions(membership(mask.kv_num_blocks, mask.kv_indices), mask.BLOCK_SIZE, kept)
    kept = kept & listed
    if mask.full_kv_num_blocks is not None:
        kept = kept | _positions(membership(mask.full_kv_num_blocks, mask.full_kv_indices), mask.BLOCK_SIZE, kept)
    q, k, v = module.qkv(x)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~kept, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("mask", AGREE.values(), ids=AGREE)
def test_lists_that_follow_from_the_function_are_trusted(mask):
    assert agrees(mask())
    module, (x, _) = Constant(mask()), inputs(2, S)
    fused = fxfuse.fuse(export(module, (x,)))
    assert statuses(fused) == ["fused"]
    with torch.no_grad():
        torch.testing.assert_close(fused.module()(x), kernel(module, x, mask()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", DIFFER.values(), ids=DIFFER)
def test_lists_that_say_something_else_are_refused(mask):
    assert not agrees(mask())
    program = export(Constant(mask()), inputs(2, S)[:1])
    fused = fxfuse.fuse(program)
    assert statuses(fused) == ["near miss"]
    (entry,) = fxfuse.report(fused)
    assert 'block_mask="reconstruct"' in entry.reason and 'block_mask="assume_mask_mod"' in entry.reason


@pytest.mark.parametrize("mask", [m for n, m in DIFFER.items() if "twice" not in n])
def test_reconstruct_is_the_compiled_kernel(mask):
    module, (x, _) = Constant(mask()), inputs(2, S)
    fused = fxfuse.fuse(export(module, (x,)), block_mask="reconstruct")
    assert statuses(fused) == ["fused"]
    with torch.no_grad():
        torch.testing.assert_close(fused.module()(x), kernel(module, x, mask()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", DIFFER.values(), ids=DIFFER)
def test_assume_mask_mod_is_the_eager_kernel(mask):
    module, (x, _) = Constant(mask()), inputs(2, S)
    fused = fxfuse.fuse(export(module, (x,)), block_mask="assume_mask_mod")
    assert statuses(fused) == ["fused"]
    with torch.no_grad():
        torch.testing.assert_close(fused.module()(x), module(x), rtol=1e-5, atol=1e-6)


def test_lists_made_in_forward_from_the_same_function_are_trusted():
    """Captured by hand: the lists depend on the inputs, and so does the function."""
    module, args = MaskInside(), inputs(2, 140)
    with torch.no_grad():
        fused = fxfuse.fuse(torch.export.export(module, args))
    assert statuses(fused) == ["fused"]


class ListsOfAnother(Attention):
    """The lists are of the documents, the function is of more than them."""

    def forward(self, x, ids):
        b, s, _ = x.shape
        mask = create_block_mask(documents(ids), b, None, s, s, device=x.device, BLOCK_SIZE=BLOCK)
        mask.mask_mod = causal
        return flex_attention(*self.qkv(x), block_mask=mask)


def test_lists_made_in_forward_from_another_function_are_refused():
    with torch.no_grad():
        program = torch.export.export(ListsOfAnother(), inputs(2, S))
    assert statuses(fxfuse.fuse(program)) == ["near miss"]


def test_two_calls_that_differ_in_their_lists_only():
    """One is trusted, one is not: neither answer is taken for the other."""

    class Two(Constant):
        def __init__(self):
            super().__init__(DIFFER["lists of another function"]())
            self.good = made(causal)
            self.register_buffer("good_counts", self.good.kv_num_blocks)

        def forward(self, x):
            q, k, v = self.qkv(x)
            return flex_attention(q, k, v, block_mask=self.good) + flex_attention(q, k, v, block_mask=self.mask)

    assert sorted(statuses(fxfuse.fuse(export(Two(), inputs(2, S)[:1])))) == ["fused", "near miss"]


def test_lists_that_are_inputs_are_refused():
    mask = DIFFER["lists of another function"]()
    fused = fxfuse.fuse(export(MaskGiven(), (inputs(2, S)[0], mask)))
    (entry,) = fxfuse.report(fused)
    assert entry.status == "near miss" and "inputs of the program" in entry.reason


def test_an_unknown_choice_is_an_error():
    program = export(Constant(made(causal)), inputs(2, S)[:1])
    with pytest.raises(fxfuse.FxfuseError, match="block_mask"):
        fxfuse.fuse(program, block_mask="yes")


def test_the_doors_know_the_choice():
    args = inputs(2, S)[:1]
    mask = DIFFER["lists of another function"]
    with torch.no_grad(), pytest.raises(fxfuse.FxfuseError, match=r"(?s)reconstruct.*assume_mask_mod"):
        fxfuse.onnx.export(Constant(mask()).eval(), args)
    with torch.no_grad():
        program = fxfuse.onnx.export(Constant(mask()).eval(), args, block_mask="assume_mask_mod")
        assert sum(node.op_type == "Attention" for node in program.model.graph) == 1
        capture = fxfuse.prepass(torch.export.export, block_mask="reconstruct")
        assert statuses(capture(Constant(mask()).eval(), args)) == ["fused"]
    for door in (fxfuse.prepass, fxfuse.onnx.install):
        with pytest.raises(fxfuse.FxfuseError, match="block_mask"):
            door(block_mask="yes")
