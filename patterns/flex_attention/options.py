"""What a caller may choose of flex_attention: the values of `fxfuse.patterns.flex_attention.FlexAttention`'s options.

The first value of each is the default; what each means stands there.
"""

from __future__ import annotations

from typing import Literal

FlexCalls = Literal["standard", "preview", "preview_only"]
Windows = Literal["mask", "attributes"]
BlockMasks = Literal["check", "reconstruct", "assume_mask_mod"]

WINDOW_OPSET = 25
"""Attention has window attributes from here on."""
