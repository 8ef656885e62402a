"""Writing an ONNX model so that a reader finds either all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fxfuse.errors import FxfuseError


def save(
    program: torch.onnx.ONNXProgram,
    f: str | os.PathLike[str],
    *,
    external_data: bool = True,
    include_initializers: bool = True,
    keep_initializers_as_inputs: bool = False,
) -> None:
    """Writes `program` to `f`, and its weights to ``f + ".data"`` if `external_data` or if they exceed 2 GB.

    Both files are written in a folder beside `f` and moved into place when they are whole, the model last.

    Raises:
        FxfuseError: `f` cannot be written.
    """
    target = Path(f)
    with staging(target.parent, target.name) as folder:
        try:
            program.save(
                folder / target.name,
                external_data=external_data,
                include_initializers=include_initializers,
                keep_initializers_as_inputs=keep_initializers_as_inputs,
            )
            move_into(folder, target.parent, model=target.name)
        except OSError as error:
            raise FxfuseError(f"writing failed: {error.strerror or error}", where=str(target)) from error


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `parent` to write in; it is gone when the block ends, however it ends."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise FxfuseError(
            f"the output folder cannot be written: {error.strerror or error}",
            where=str(parent),
            hint="name a folder that can be made and written",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into(source: Path, target: Path, model: str) -> None:
    """Moves the files of `source` into `target`, over older ones.

    `model` is the file that makes the others a model: an older one goes first and the new one comes last, so that
    at no time does it stand beside another model's weights.
    """
    (target / model).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == model):
        os.replace(path, target / path.name)
