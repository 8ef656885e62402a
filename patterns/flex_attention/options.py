"""What a caller may ask of flex_attention beside what it is by itself."""

from __future__ import annotations

from typing import Literal, get_args

from fxfuse.errors import FxfuseError

FlexCalls = Literal["standard", "preview", "preview_only"]
"""What a call becomes. ``"standard"``: one Attention, or primitives. ``"preview"``: FlexAttention of ai.onnx.preview
instead of the primitives. ``"preview_only"``: instead of both."""
Windows = Literal["mask", "attributes"]
"""What ``q - kv <= n`` becomes in an Attention: part of its mask, or (from opset 25 on) an attribute."""
WINDOW_OPSET = 25


def check_flex_attention(flex_attention: object) -> None:
    """Raises FxfuseError if it is none of `FlexCalls`."""
    _one_of(get_args(FlexCalls), flex_attention, "flex_attention")


def check_windows(windows: object, opset: int | None = None) -> None:
    """Raises FxfuseError if it is none of `Windows`, or one that this opset does not have."""
    _one_of(get_args(Windows), windows, "windows")
    if windows == "attributes" and opset is not None and opset < WINDOW_OPSET:
        raise FxfuseError(
            f"Attention has window attributes from opset {WINDOW_OPSET} on, not in opset {opset}",
            where="windows",
            hint=f'opset {WINDOW_OPSET}, or windows="mask"; ONNX Runtime\'s CPU kernels of Attention end at 24',
        )


def _one_of(known: tuple[str, ...], value: object, name: str) -> None:
    if value not in known:
        raise FxfuseError(f"unknown {name}={value!r}", where=name, hint=" or ".join(map(repr, known)))
