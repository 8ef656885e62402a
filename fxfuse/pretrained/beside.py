"""What a checkpoint's folder holds beside the model: the modules that sentence-transformers puts after it."""

from __future__ import annotations

import json
from pathlib import Path

from fxfuse.errors import FxfuseError

MODULES = "modules.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def left_out(folder: Path, *, allow_missing: bool = False) -> list[str]:
    """Notes on what in `folder` is not exported: pooling and other modules that follow the model.

    Raises:
        FxfuseError: some of it has weights, unless `allow_missing`; or modules.json cannot be read.
    """
    file = folder / MODULES
    if not file.is_file():
        return []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        named = {module["path"]: module["type"].rpartition(".")[2] for module in modules[1:]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FxfuseError(f"not a list of modules: {error}", where=str(file)) from error
    if not named:
        return []
    heavy = [path for path in named if path and any(any((folder / path).glob(kind)) for kind in _WEIGHTS)]
    if heavy and not allow_missing:
        raise FxfuseError(
            f"weights beside the model are not exported: {', '.join(f'{path} ({named[path]})' for path in heavy)}",
            where=str(folder),
            hint="write a factory function that returns all of it, or leave them out with --allow-missing",
        )
    return [f"what follows the model in {MODULES} is not exported: {', '.join(named.values())}"]
