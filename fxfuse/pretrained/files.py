"""What lies beside the weights in a checkpoint's folder and goes with the exported model."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
CONFIGURATION = ("config.json", "preprocessor_config.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies what belongs to a tokenizer, as transformers names it."""
    _copy(source, folder, TOKENIZER)


def copy_configuration(source: Path, folder: Path) -> None:
    """Copies what says what the model is and how its inputs are made."""
    _copy(source, folder, CONFIGURATION)


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy(path, folder / path.name)
