"""Copying the files of a checkpoint that go with the exported model: tokenizer, configuration, preprocessor."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
CONFIGURATION = ("config.json", "preprocessor_config.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, by the names that transformers gives them."""
    _copy(source, folder, TOKENIZER)


def copy_configuration(source: Path, folder: Path) -> None:
    """Copy the files that say what the model is (config.json, …) and how its inputs are made (preprocessors)."""
    _copy(source, folder, CONFIGURATION)


def _copy(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy(path, folder / path.name)
