"""A block mask that is its mask function: one partial block over everything.

Block lists say where the compiled kernel need not look; what is masked, the mask function says alone. A mask of one
block that is larger than any sequence holds no list that depends on a length, so that nothing is computed, guarded or
specialised while a program is captured: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from fxfuse.patterns.flex_attention.capturing.closures import with_tensors, without_tensors
from fxfuse.torch_seams import is_mask_mod, pytree, sliced_mask_mod, torch_flex

LARGE = 1 << 30
"""The block size that flex_attention itself gives to "no mask": it compares no lengths with such a mask's."""
MaskFunction = Any
"""(b, h, q, kv), scalar integer tensors, to a scalar boolean: is the key kept?"""


class OneBlockMask(BlockMask):
    """One partial block; a pytree whose leaves are the tensors that `mask_mod` captured.

    As an argument of an exported program it has these inputs only, and no length: the program may be called with the
    mask of another length.
    """

    def __getitem__(self, index: Any) -> OneBlockMask:
        """As with any sliced mask, its function is to be set anew."""
        return one_block(sliced_mask_mod(), self.seq_lengths, self.kv_num_blocks.device)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> OneBlockMask:
        return one_block(self.mask_mod, (new_q_len, new_kv_len), self.kv_num_blocks.device)


def one_block(
    mask_mod: MaskFunction, lengths: tuple[int, int], device: torch.device | str | None, batch: int = 1, heads: int = 1
) -> OneBlockMask:
    """The mask of queries and keys of these `lengths` that `mask_mod` describes."""
    count = torch.ones([batch, heads, 1], dtype=torch.int32, device=device)
    index = torch.zeros([batch, heads, 1, 1], dtype=torch.int32, device=device)
    # The lists by query are for the backward pass, which wants them.
    return OneBlockMask(lengths, count, index, None, None, count, index, None, None, (LARGE, LARGE), mask_mod)


def create_block_mask(
    mask_mod: MaskFunction,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    *_: Any,
    **__: Any,
) -> OneBlockMask:
    """Stands in for torch's `create_block_mask`: the same mask, and no lists."""
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    if not is_mask_mod(mask_mod):
        raise AssertionError(f"create-block_mask requires a mask_mod function! Got {mask_mod}")  # torch's own words
    return one_block(mask_mod, (Q_LEN, KV_LEN), device, 1 if B is None else B, 1 if H is None else H)


def create_empty_block_mask(query: torch.Tensor, key: torch.Tensor) -> OneBlockMask:
    """Stands in for what flex_attention makes where it is given no mask: 30 nodes of lists that say nothing."""
    return one_block(torch_flex.noop_mask, (1, 1), query.device)


def flatten(mask: BlockMask) -> tuple[list[Any], Any]:
    function, tensors = without_tensors(mask.mask_mod)
    return list(tensors), (function, str(mask.kv_num_blocks.device))


def keyed(
    flatten: Callable[[Any], tuple[list[Any], Any]],
) -> Callable[[Any], tuple[list[tuple[Any, Any]], Any]]:
    """`flatten` with the place of each leaf."""

    def flatten_with_keys(mask: Any) -> tuple[list[tuple[Any, Any]], Any]:
        leaves, context = flatten(mask)
        return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(leaves)], context

    return flatten_with_keys


def unflatten(tensors: Sequence[Any], context: Any) -> OneBlockMask:
    function, device = context
    return one_block(with_tensors(function, list(tensors)), (1, 1), device)


pytree.register_pytree_node(
    OneBlockMask,
    flatten,
    unflatten,  # type: ignore[arg-type]
    flatten_with_keys_fn=keyed(flatten),
    serialized_type_name="fxfuse.patterns.flex_attention.capture.OneBlockMask",
)
