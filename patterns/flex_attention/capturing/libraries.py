"""What TorchTune and transformers put around flex_attention, while a model of theirs is captured.

Neither is imported here: what is not loaded has no models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fxfuse.patches import Patch, attribute, body, here
from fxfuse.patterns.flex_attention.capturing.one_block import create_block_mask
from fxfuse.versions import TUNE_CALL, TUNE_DOCUMENTS

Function = Callable[..., Any]


def torchtune() -> Iterator[Patch]:
    """torchtune/modules/attention_utils.py decides at import, by the machine's GPU, whether there is flex_attention."""
    utils: Any = sys.modules.get("torchtune.modules.attention_utils")
    attention: Any = sys.modules.get("torchtune.modules.attention")
    if utils is not None and attention is not None:
        # With a GPU it makes lists, on "cuda" wherever the model is; without one a mask [B, S, S].
        yield body(utils.packed_block_causal_mask, _packed_block_causal_mask)
        # With a GPU it calls a compiled flex_attention that torch.export refuses ("Non-recursive
        # torch.compiler.disable is not supported with torch.export"); without one it takes no BlockMask at all.
        yield attribute(attention.MultiHeadAttention, TUNE_CALL, _AttentionCall())


def transformers() -> Iterator[Patch]:
    """transformers/masking_utils.py. What it compiles, it runs as it is in a capture (`is_torchdynamo_compiling`)."""
    masks: Any = sys.modules["transformers.masking_utils"]
    # flex_attention_mask leaves a 2-D mask out if all of it is true: a guard on data, where it is an input.
    yield attribute(masks, "fast_all", _fast_all(masks.fast_all))


def packed_block_causal_mask(seq_lens: list[torch.Tensor]) -> BlockMask:
    """TorchTune's mask of packed samples, `seq_lens` a list of lengths for each pack: causal, within a sample."""
    utils: Any = sys.modules["torchtune.modules.attention_utils"]
    documents = getattr(utils, TUNE_DOCUMENTS)(seq_lens)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (documents[b, q_idx] == documents[b, kv_idx])

    packs, length = documents.shape
    return create_block_mask(mask_mod, packs, None, length, length, device=documents.device)


def _packed_block_causal_mask(*args: Any, **kwargs: Any) -> Any:
    from fxfuse.patches import here, originals
    from fxfuse.patterns.flex_attention.capturing.libraries import packed_block_causal_mask

    return (packed_block_causal_mask if here() else originals["packed_block_causal_mask"])(*args, **kwargs)


class _AttentionCall:
    """What stands in an attention's own `_attention_call`, but for block masks, which go to flex_attention."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        own = module.__dict__[TUNE_CALL]

        def attention_call(q: Any, k: Any, v: Any, mask: Any, dropout_p: float, is_causal: bool) -> Any:
            if not (isinstance(mask, BlockMask) and here()):
                return own(q, k, v, mask, dropout_p, is_causal)
            if dropout_p > 0.0:
                raise ValueError("Flex attention does not support dropout. Please set dropout to 0.0.")
            return flex_attention(q, k, v, block_mask=mask)

        return attention_call

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__[TUNE_CALL] = value


def _fast_all(original: Function) -> Function:
    def fast_all(tensor: torch.Tensor) -> Any:
        return False if torch.compiler.is_exporting() and here() else original(tensor)

    return fast_all
