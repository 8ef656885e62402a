"""Block masks as arguments of an exported program.

Torch does not register `BlockMask` as a pytree, and an argument that is none is refused ("Unsupported input type",
torch/export/_trace.py). It is one within `fxfuse.flex_capture`, unless somebody registered it. Where its lists follow
from its function it becomes a `OneBlockMask`, and the program is called with masks that were made within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention.flex_attention import BlockMask

from fxfuse.patches import Patch, Undo
from fxfuse.patterns.flex_attention.capturing.closures import with_tensors, without_tensors
from fxfuse.patterns.flex_attention.capturing.lists import agrees
from fxfuse.patterns.flex_attention.capturing.one_block import flatten, keyed, unflatten
from fxfuse.torch_seams import deregister, pytree, without_modes

# The type of mask_mod, which takes tensors, is written out in torch 2.11.
_LISTS = [n for n, kind in BlockMask.__annotations__.items() if "Tensor" in str(kind) and n != "mask_mod"]
_agree: WeakKeyDictionary[BlockMask, bool] = WeakKeyDictionary()
"""Masks whose lists were compared with their function."""


def block_masks_as_pytrees() -> Patch:
    """`BlockMask` is a pytree: the tensors that its function captured, and lists only if these say something else."""

    def apply() -> Undo:
        if BlockMask in pytree.SUPPORTED_NODES:
            return lambda: None
        pytree.register_pytree_node(
            BlockMask,
            _flatten,
            _unflatten,  # type: ignore[arg-type]
            flatten_with_keys_fn=keyed(_flatten),
            serialized_type_name="torch.nn.attention.flex_attention.BlockMask",
        )
        return lambda: deregister(BlockMask)

    return (BlockMask, "pytree"), apply


def _flatten(mask: BlockMask) -> tuple[list[Any], Any]:
    if _says_nothing_more(mask):
        return flatten(mask)
    function, tensors = without_tensors(mask.mask_mod)
    kept = tuple(name for name in _LISTS if getattr(mask, name, None) is not None)
    others = tuple(
        (name, getattr(mask, name)) for name in BlockMask.__annotations__ if name not in (*_LISTS, "mask_mod")
    )
    return [*(getattr(mask, name) for name in kept), *tensors], (function, kept, others)


def _unflatten(leaves: Sequence[Any], context: Any) -> BlockMask:
    if len(context) == 2:
        return unflatten(leaves, context)
    function, kept, others = context
    mask = object.__new__(BlockMask)
    given = dict(zip(kept, leaves, strict=False))
    for name, value in {**dict.fromkeys(_LISTS), **given, **dict(others)}.items():
        setattr(mask, name, value)
    mask.mask_mod = with_tensors(function, list(leaves[len(kept) :]))
    return mask


def _says_nothing_more(mask: BlockMask) -> bool:
    """Do the lists follow from the function? Asked of real tensors; what is traced has no values to compare."""
    if mask not in _agree:
        if type(mask.kv_num_blocks) is not torch.Tensor:
            return False
        with without_modes():  # torch.export asks under its own, where no tensor has a value
            _agree[mask] = agrees(mask)
    return _agree[mask]
