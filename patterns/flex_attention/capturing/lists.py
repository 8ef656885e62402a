"""Block lists compared with the mask function that they stand beside.

The compiled kernel looks only at blocks that are listed, and does not ask the function about those listed as full; the
eager one asks the function alone. They compute the same if every block that is not listed is masked throughout, and
every block listed as full is kept throughout; a listed block may be masked, which costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from fxfuse.torch_seams import at_every_position

MAX_POSITIONS = 1 << 26
"""Of larger masks the function is not asked at every position."""


def agrees(mask: BlockMask) -> bool:
    """Does `mask` compute the same with its lists as without? False too where that takes too long to find out."""
    batch, heads = mask.kv_num_blocks.shape[:2] if mask.kv_num_blocks.dim() == 3 else (0, 0)
    queries, keys = mask.seq_lengths
    if not batch or batch * heads * queries * keys > MAX_POSITIONS:
        return False
    try:
        kept = dense(mask.mask_mod, batch, heads, queries, keys, mask.kv_num_blocks.device)
    except Exception:  # a user's function, at positions that it may not be made for
        return False
    counts, indices = mask.full_kv_num_blocks, mask.full_kv_indices
    full = None if counts is None or indices is None else (counts, indices)
    return disagreement(kept, (mask.kv_num_blocks, mask.kv_indices), full, mask.BLOCK_SIZE) is None


def dense(
    mask_mod: Callable[..., Any], batch: int, heads: int, queries: int, keys: int, device: torch.device | None = None
) -> torch.Tensor:
    """What the function says at every position, [B, H, S, T] boolean."""
    b, h, q, k = (torch.arange(n, device=device) for n in (batch, heads, queries, keys))
    with torch.no_grad():
        return at_every_position(mask_mod, b, h, q, k)


def disagreement(
    kept: torch.Tensor,
    partial: tuple[torch.Tensor, torch.Tensor],
    full: tuple[torch.Tensor, torch.Tensor] | None,
    block: tuple[int, int],
) -> str | None:
    """Where the lists would change what `kept` [B, H, S, T] says, in words; None where nowhere.

    `partial` and `full` are counts [B, H, rows] and indices [B, H, rows, columns], B and H possibly 1.
    """
    listed = membership(*partial)
    filled = membership(*full) if full is not None else torch.zeros_like(listed)
    columns = max(listed.shape[-1], filled.shape[-1], -(-kept.shape[-1] // block[1]))
    rows = -(-kept.shape[-2] // block[0])
    listed, filled = (torch.nn.functional.pad(m, (0, columns - m.shape[-1])) for m in (listed, filled))
    counted = partial[0] if full is None else partial[0] + full[0]
    if bool(((listed | filled).sum(-1) != counted).any()):
        return "a block is listed twice"
    if listed.shape[-2] < rows or filled.shape[-2] < rows:
        return f"{listed.shape[-2]} rows of blocks for {kept.shape[-2]} queries"
    try:
        listed, filled = (_positions(m, block, kept) for m in (listed, filled))
        missing, forced = kept & ~(listed | filled), filled & ~kept
    except RuntimeError:
        return f"lists of shape {list(partial[1].shape)} for a mask of shape {list(kept.shape)}"
    for wrong, what in (
        (missing, "the function keeps it, and it is in no block that is listed"),
        (forced, "the function masks it, and it is in a block that is listed as full"),
    ):
        if bool(wrong.any()):
            b, h, q, k = (int(i) for i in wrong.nonzero()[0])
            return f"key {k} of query {q} (batch {b}, head {h}): {what}"
    return None


def membership(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Which blocks a list names: [B, H, rows, columns] boolean. What stands after the first `counts` is not read."""
    columns = indices.shape[-1]
    read = torch.arange(columns, device=counts.device) < counts[..., None]
    where = torch.where(read, indices.long(), columns)
    wide = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=counts.device)
    return wide.scatter(-1, where, True)[..., :columns]


def _positions(blocks: torch.Tensor, block: tuple[int, int], kept: torch.Tensor) -> torch.Tensor:
    """[B, H, rows, columns] at every position of `kept` [B, H, S, T]."""
    q = torch.arange(kept.shape[-2], device=kept.device) // block[0]
    k = torch.arange(kept.shape[-1], device=kept.device) // block[1]
    return blocks[:, :, q][..., k]
