"""Sizes of 1: whether torch asks of a dynamic dimension if it is 1."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch.fx.experimental._config


def sizes_of_one() -> AbstractContextManager[None]:
    """Within the block a dynamic dimension that is 1 in the sample stays dynamic, and none is asked whether it is 1:
    a question would be a guard.

    So ``torch.onnx`` captures and decomposes (`TorchExportNonStrictStrategy` in
    torch/onnx/_internal/exporter/_capture_strategies.py).
    """
    patched: AbstractContextManager[None] = torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True
    )
    return patched
