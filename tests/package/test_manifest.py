"""A manifest is held against its schema when it is read; what is wrong is said with its place and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fxfuse.errors import FxfuseError
from fxfuse.package.manifest import MANIFEST, read_manifest
from fxfuse.package.write import write_package
from tests.package.decoders import decoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_package(tmp_path / "out", decoder(), decode=decoder())
    return tmp_path / "out"


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = folder / MANIFEST
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    return file


def test_what_was_written_is_read(folder: Path, tmp_path: Path) -> None:
    at, manifest = read_manifest(folder)
    assert at == folder and manifest.files == ["prefill.onnx", "decode.onnx"]
    assert manifest == read_manifest(folder / MANIFEST)[1]
    assert not any(link.shared for link in manifest.links) and not manifest.cache.aliases
    write_package(tmp_path / "static", decoder("slots"))
    assert read_manifest(tmp_path / "static")[1].cache.aliases["present.0.key"] == "past_key_values.0.key"


@pytest.mark.parametrize(
    ("change", "place", "why"),
    [
        (lambda m: m["cache"].update(form="liquid"), "cache.form", "'liquid' is not one of"),
        (lambda m: m["cache"]["layers"][1].update(heads=0), "cache.layers[1].heads", "0 is less than the minimum"),
        (lambda m: m["model"].update(vocab_size="16"), "model.vocab_size", "'16' is not of type 'integer'"),
        (lambda m: m["stages"].pop("decode"), "stages", "'decode' is a required property"),
        (lambda m: m["links"][2].update(color="red"), "links[2]", "'color' was unexpected"),
        (lambda m: m["links"].clear(), "links", "non-empty"),
        (lambda m: m["links"][0].update(input="past_key_values.9.key"), "links[0]", "no input past_key_values.9.key"),
        (lambda m: m["cache"]["layers"].pop(), "links[2]", "no input of a cache of 1 layers"),
        (lambda m: m["stages"]["decode"]["outputs"].remove("present.1.value"), "links[3]", "decode.onnx has no output"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(folder: Path, change: Any, place: str, why: str) -> None:
    file = changed(folder, change)
    with pytest.raises(FxfuseError, match="not a pipeline's manifest") as error:
        read_manifest(folder)
    assert error.value.where == f"{file}: {place}"
    assert why in error.value.what and "export the model again" in str(error.value.hint)


def test_another_version_is_not_guessed_at(folder: Path) -> None:
    changed(folder, lambda m: m.update(version=2))
    with pytest.raises(FxfuseError, match=r"fxfuse\.pipeline 2, not fxfuse\.pipeline 1") as error:
        read_manifest(folder)
    assert "reads version 1" in str(error.value.hint)


@pytest.mark.parametrize("text", ["{", "[]", '"text"', "\ud800"])
def test_what_is_no_json_object_is_said(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FxfuseError, match="not a pipeline's manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize(
    "name",
    ["../out/model.onnx", "sub/../../model.onnx", "/model.onnx", "C:\\model.onnx", "C:model.onnx", "..\\model.onnx"],
)
def test_files_outside_of_the_folder_are_not_opened(folder: Path, stage: str, name: str) -> None:
    file = changed(folder, lambda m: m["stages"][stage].update(file=name))
    with pytest.raises(FxfuseError, match="leads out of its folder") as error:
        read_manifest(folder)
    assert error.value.where == f"{file}: stages.{stage}.file"


def test_an_absolute_path_is_refused_though_it_is_there(folder: Path) -> None:
    changed(folder, lambda m: m["stages"]["prefill"].update(file=str(folder / "prefill.onnx")))
    with pytest.raises(FxfuseError, match="leads out of its folder"):
        read_manifest(folder)


def test_links_in_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    """Hugging Face's cache keeps every file behind one."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    folder.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert read_manifest(snapshot)[1] == read_manifest(blobs)[1]


def test_a_file_that_is_missing_is_named(folder: Path) -> None:
    (folder / "decode.onnx").unlink()
    with pytest.raises(FxfuseError, match=r"decode\.onnx is missing"):
        read_manifest(folder)
