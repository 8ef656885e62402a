"""Writing an ONNX model so that a reader finds either all of it or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


def move_into(source: Path, target: Path, model: str, *, stale: Iterable[str] = ()) -> None:
    """Moves what `source` holds into the folder `target`, over what has the same names, or leaves `target` as it was.

    What stood there is moved aside, and deleted only once everything new is in its place.

    Args:
        model: the file that makes the others a model: an older one goes first and the new one comes last, so that at no
            time does it stand beside another model's weights.
        stale: files that an older model may have left in `target`; they go even where `source` has none of that name.

    Raises:
        OSError: something could not be moved; `target` holds what it held before.
        FxfuseError: nor could what stood there be put back; the message says where it lies.
    """
    coming = sorted((path.name for path in source.iterdir()), key=lambda name: name == model)
    going = sorted({*coming, *stale, model}, key=lambda name: name != model)
    new_folder = not target.exists()
    target.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{model}.", suffix=".previous", dir=target))
    try:
        for name in going:
            if os.path.lexists(target / name):
                if _is_folder(target / name) and not _is_folder(source / name):
                    raise IsADirectoryError(errno.EISDIR, f"{target / name} is a folder")
                os.replace(target / name, aside / name)
        for name in coming:
            os.replace(source / name, target / name)
    except BaseException as error:
        try:
            _put_back(aside, target, [name for name in coming if not os.path.lexists(source / name)], model)
            if new_folder:
                target.rmdir()
        except OSError as failed:
            raise FxfuseError(
                f"the new files could not be written ({error}), nor those before put back ({failed})",
                where=str(target),
                hint=f"what stood there lies in {aside}: move it back",
            ) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, target: Path, moved: Iterable[str], model: str) -> None:
    """Takes out of `target` what was moved there, and moves back what lies `aside`, the model last."""
    for name in moved:
        if _is_folder(target / name):
            shutil.rmtree(target / name)
        else:
            (target / name).unlink(missing_ok=True)
    for name in sorted((path.name for path in aside.iterdir()), key=lambda name: name == model):
        os.replace(aside / name, target / name)
    aside.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
