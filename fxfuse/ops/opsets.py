"""Which ONNX opsets the translations of the operators are for."""

from __future__ import annotations

from fxfuse.errors import FxfuseError

FIRST_OPSET = 23
"""The first ONNX opset that is exported to: RMSNormalization, RotaryEmbedding and Attention came with it."""

LAST_OPSET = 25
"""The last ONNX opset that these translations were checked against."""


def check_opset(opset: object) -> None:
    """Raise FxfuseError unless the fused operators exist in this opset."""
    if not isinstance(opset, int) or isinstance(opset, bool) or not FIRST_OPSET <= opset <= LAST_OPSET:
        raise FxfuseError(
            f"the fused operators exist in ONNX opsets {FIRST_OPSET} to {LAST_OPSET}, not in opset {opset!r}",
            where="opset",
            hint="use 24: it has all of them, and ONNX Runtime has kernels for all of them",
        )
