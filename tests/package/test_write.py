"""A package is written whole or not at all: wherever writing fails, the folder holds what it held before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import fxfuse.files
from fxfuse.errors import FxfuseError
from fxfuse.files import move_into
from fxfuse.package import write
from fxfuse.package.manifest import MANIFEST
from fxfuse.package.write import write_package
from tests.package.decoders import decoder

MODEL = {"context_length": 64, "pad": 0}


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An older package of one graph, and a file of its user's."""
    write_package(tmp_path / "out", decoder(layers=1), model=MODEL)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    return tmp_path / "out"


@pytest.fixture
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_new(out: Path, tokenizer: Path, check: Any = None) -> None:
    write_package(out, decoder(), decode=decoder(), package="genai", model=MODEL, tokenizer=tokenizer, check=check)


def test_a_new_package_takes_the_place_of_the_old_one(old: Path, tokenizer: Path) -> None:
    write_new(old, tokenizer)
    names = {"prefill.onnx", "decode.onnx", "weights.data", MANIFEST, "genai_config.json", "tokenizer.json"}
    assert held(old).keys() == names | {"notes.txt"}
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def fails(*args: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("there", [True, False], ids=["over an older one", "in a new folder"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (write.ir, "save"),
        (write, "share_weights"),
        (write.Manifest, "write"),
        (write, "write_genai_config"),
        (write, "copy_tokenizer"),
        (write, "move_into"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_step_may_fail(
    there: bool, owner: Any, name: str, old: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not there:
        shutil.rmtree(old)
    before = held(old)
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(FxfuseError, match="No space left"):
        write_new(old, tokenizer)
    assert held(old) == before and [path.name for path in old.parent.iterdir()] == (["out"] if there else [])


def test_the_second_graph_may_fail(old: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = ir.save, list[str]()

    def second(model: ir.Model, path: Path, **options: Any) -> None:
        calls.append(path.name)
        (save if len(calls) == 1 else fails)(model, path, **options)

    before = held(old)
    monkeypatch.setattr(write.ir, "save", second)
    with pytest.raises(FxfuseError, match="No space left"):
        write_new(old, tokenizer)
    assert calls == ["prefill.onnx", "decode.onnx"] and held(old) == before


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=repr)
def test_whatever_the_check_raises(old: Path, tokenizer: Path, error: BaseException) -> None:
    def check(folder: Path) -> None:
        raise error

    before = held(old)
    with pytest.raises(type(error)):
        write_new(old, tokenizer, check)
    assert held(old) == before and [path.name for path in old.parent.iterdir()] == ["out"]


class Moves:
    """`os.replace`, of which the calls with these numbers fail."""

    def __init__(self, failing: Any, error: type[BaseException] = OSError) -> None:
        self.failing, self.error, self.count = failing, error, 0

    def __call__(self, source: Path, target: Path) -> None:
        self.count += 1
        if self.count - 1 in self.failing:
            raise self.error(5, "Input/output error")
        os.rename(source, target)


@pytest.mark.parametrize("there", [True, False], ids=["over an older one", "in a new folder"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_each_move_may_fail(
    there: bool, error: type[BaseException], old: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not there:
        shutil.rmtree(old)
    before, number = held(old), 0
    while True:
        monkeypatch.setattr(fxfuse.files.os, "replace", moves := Moves({number}, error))
        try:
            write_new(old, tokenizer)
            break
        except (FxfuseError, KeyboardInterrupt):
            assert held(old) == before, f"move {number} failed"
            assert [path.name for path in old.parent.iterdir()] == (["out"] if there else [])
        number += 1
    assert number == moves.count >= (8 if there else 5)
    assert MANIFEST in held(old) and "model.onnx" not in held(old)


def test_what_cannot_be_put_back_is_named(old: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is gone for good, nothing is deleted, and the message says where it lies."""
    before = held(old)
    monkeypatch.setattr(fxfuse.files.os, "replace", Moves(range(3, 100)))
    with pytest.raises(FxfuseError, match="nor those before put back") as error:
        write_new(old, tokenizer)
    monkeypatch.undo()
    (aside,) = [path for path in old.iterdir() if path.is_dir()]
    assert str(aside) in str(error.value.hint)
    for path in aside.iterdir():
        path.rename(old / path.name)
    aside.rmdir()
    assert held(old) == before


def test_a_folder_in_the_place_of_a_file_is_left_alone(tmp_path: Path) -> None:
    for name in ("new", "target/model.onnx"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "new" / "model.onnx").write_text("new")
    (tmp_path / "target" / "model.onnx" / "inside").write_text("mine")
    with pytest.raises(IsADirectoryError):
        move_into(tmp_path / "new", tmp_path / "target", model="model.onnx")
    assert held(tmp_path / "target") == {"model.onnx/inside": b"mine"}
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["model.onnx"]
