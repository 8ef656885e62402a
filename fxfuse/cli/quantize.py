"""``--quantize``: what the command line takes for `fxfuse.integrations.torchao`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fxfuse.errors import FxfuseError


def check_quantize(arguments: argparse.Namespace) -> None:
    """Refuse schemes that there are none of, before anything is loaded.

    Raises:
        FxfuseError: such a scheme, a scheme of the embedding or the output alone, or a source that is captured already.
    """
    parts = {"--quantize-embedding": arguments.quantize_embedding, "--quantize-head": arguments.quantize_head}
    if arguments.quantize is None:
        for option, value in parts.items():
            if value is not None:
                raise FxfuseError(f"{option} goes with --quantize", where=arguments.source)
        return
    if arguments.source.endswith(".pt2"):
        raise FxfuseError(
            "--quantize does not apply to a saved program: its weights are read by what was captured already",
            where=arguments.source,
            hint="quantise the model, capture it and save that",
        )
    from fxfuse.integrations.torchao import parse_scheme

    for text in (arguments.quantize, *parts.values()):
        if text is not None:
            parse_scheme(text)


def quantized(model: Any, arguments: argparse.Namespace) -> list[str]:
    """Quantise the loaded model in place where that is asked for; what its user should know about it.

    Raises:
        FxfuseError: what `fxfuse.integrations.torchao.quantize` refuses.
    """
    if arguments.quantize is None or not isinstance(model, torch.nn.Module):
        return []
    from fxfuse.integrations.torchao import described, quantize

    chosen = quantize(model, arguments.quantize, embedding=arguments.quantize_embedding, head=arguments.quantize_head)
    return [described(chosen)]
