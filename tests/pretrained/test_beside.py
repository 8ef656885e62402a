"""A folder of sentence-transformers holds more than the model of transformers: what is left out is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxfuse.errors import FxfuseError
from fxfuse.pretrained.beside import left_out

MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def test_what_follows_the_model(tmp_path: Path) -> None:
    assert left_out(tmp_path) == []
    (tmp_path / "modules.json").write_text(json.dumps(MODULES[:1]))
    assert left_out(tmp_path) == []
    (tmp_path / "modules.json").write_text(json.dumps(MODULES[:2]))
    assert left_out(tmp_path) == ["what follows the model in modules.json is not exported: Pooling"]


def test_weights_that_follow_it(tmp_path: Path) -> None:
    """They are weights that the checkpoint has and nothing uses."""
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense" / "model.safetensors").touch()
    with pytest.raises(FxfuseError, match=r"weights beside the model are not exported: 2_Dense \(Dense\)"):
        left_out(tmp_path)
    assert "Pooling, Dense" in left_out(tmp_path, allow_missing=True)[0]


def test_no_list_of_modules(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[1, 2]")
    with pytest.raises(FxfuseError, match="not a list of modules"):
        left_out(tmp_path)
