"""Compares a folder with the model that it was written from: the logits of a padded prompt and of the steps after
it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fxfuse.errors import ParityError
from fxfuse.package.manifest import read_manifest
from fxfuse.package.write import with_dtype
from fxfuse.parity import Result, compare, float32_twin
from fxfuse.runtime.generate import Decoder
from fxfuse.runtime.session import Session

PROMPT, STEPS, ROWS = 6, 3, 3


def check_package(folder: Path, eager: Decoder, wide: Decoder | None = None) -> list[Result]:
    """Compares the folder with the model on three random rows, the first of them padded on the left.

    A streaming cache computes something else than the model once a token has dropped out. It is compared up to there,
    and without padding, which it does not take.

    Args:
        folder: with a manifest, its graphs and weights.
        eager: the model in eager PyTorch, in its own dtype.
        wide: the same model in a wider dtype, where `eager` rounds to 16 bits: it tells rounding from errors.

    Returns:
        A comparison for the prompt and for each step.

    Raises:
        ParityError: the folder computes something else.
        FxfuseError: it does not run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        session = _open(folder, Path(scratch))
        draw = torch.Generator().manual_seed(0)
        cache, prompt, steps = session.manifest.cache, PROMPT, STEPS
        if streams := cache.form == "streaming":
            room = cache.max_length or PROMPT + STEPS
            steps = min(STEPS, room - 1)
            prompt = min(PROMPT, room - steps)
        ids = torch.randint(0, session.manifest.model.vocab_size, (ROWS, prompt + steps), generator=draw)
        mask = torch.ones(ROWS, prompt, dtype=torch.int64)
        mask[0, : 0 if streams else prompt // 2] = 0
        runs = [eager, session] if wide is None else [eager, session, wide]
        eager.reset()
        results = [_compare(folder, *(each.prefill(ids[:, :prompt], mask) for each in runs))]
        for column in range(prompt, prompt + steps):
            results.append(_compare(folder, *(each.step(ids[:, column]) for each in runs)))
    return results


def _compare(folder: Path, expected: torch.Tensor, actual: torch.Tensor, wide: torch.Tensor | None = None) -> Result:
    result = compare([expected], [actual], None if wide is None else [wide], expected.dtype)
    if not result.passed:
        raise ParityError(f"ONNX Runtime does not give the model's logits: {result.reason}", where=str(folder))
    return result


def _open(folder: Path, scratch: Path) -> Session:
    """A session for the folder. ONNX Runtime's CPU provider has no kernels for bfloat16: of such a folder a twin in
    float32 is written into `scratch`, and run."""
    _, manifest = read_manifest(folder)
    if manifest.cache.dtype == "bfloat16":
        for name in manifest.files:
            float32_twin(folder / name, scratch / name)
        with_dtype(manifest, "float32").write(scratch)
        folder = scratch
    return Session(folder, max_length=PROMPT + STEPS + 2 if manifest.cache.takes_length else None)
