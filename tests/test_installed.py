"""A package outside the bounds of pyproject.toml is named, with what is needed, before it fails in some other way."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import fxfuse.installed
from fxfuse.cli.torchtune import find
from fxfuse.installed import UnfitError, check_installed

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions of packages that are other ones, or None: not installed. The bounds are the checkout's."""
    found: dict[str, str | None] = {}

    def pretended(name: str) -> str:
        stands = found.get(name, version(name) if name not in found else None)
        if stands is None:
            raise PackageNotFoundError(name)
        return stands

    requirements = [*PROJECT["dependencies"]]
    for extra, more in PROJECT["optional-dependencies"].items():
        requirements += [f'{r}{" and" if ";" in r else ";"} extra == "{extra}"' for r in more]
    monkeypatch.setattr(fxfuse.installed, "version", pretended)
    monkeypatch.setattr(fxfuse.installed, "requires", lambda name: requirements)
    return found


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_what_the_tests_run_with_fits(extra: str, pretend: dict[str, str | None]) -> None:
    check_installed(extra)


@pytest.mark.parametrize(
    ("extra", "package", "found", "message"),
    [
        ("", "torch", "2.9.1+cu128", r"torch 2\.9\.1\+cu128 is installed, and fxfuse needs torch>=2\.11"),
        ("", "onnx", "1.19.1", r"onnx 1\.19\.1 is installed, and fxfuse needs onnx>=1\.20"),
        ("transformers", "transformers", "5.17.0", r"fxfuse\[transformers\] needs transformers<6,>=5\.23"),
        ("torchtune", "torchao", "0.18.0", r"fxfuse\[torchtune\] needs torchao<0\.16,>=0\.13"),
        ("ort", "onnxruntime", "1.24.1", r"fxfuse\[ort\] needs onnxruntime>=1\.25"),
    ],
)
def test_what_does_not_fit_is_named(
    extra: str, package: str, found: str, message: str, pretend: dict[str, str | None]
) -> None:
    pretend[package] = found
    with pytest.raises(UnfitError, match=message) as caught:
        check_installed(extra)
    assert caught.value.hint is not None and f"pip install '{package}" in caught.value.hint
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("found", ["2.11.0+cu130", "2.15.0", "2.16.0.dev20261101", None])
def test_builds_nightlies_and_what_is_missing_pass(found: str | None, pretend: dict[str, str | None]) -> None:
    pretend["torch"] = found
    check_installed()


def test_each_door_looks_at_its_own_extra(pretend: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend.update(transformers="5.17.0", torchao="0.18.0")
    check_installed()
    monkeypatch.delitem(sys.modules, "fxfuse.integrations.transformers", raising=False)
    with pytest.raises(UnfitError, match=r"transformers 5\.17\.0"):
        importlib.import_module("fxfuse.integrations.transformers")
    with pytest.raises(UnfitError, match=r"torchao 0\.18\.0"):
        find("llama3_2")


def test_an_old_torch_is_named_at_import() -> None:
    program = (
        "import importlib.metadata as m; own = m.version; "
        "m.version = lambda name: '2.9.1' if name == 'torch' else own(name); import fxfuse"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    error = "fxfuse.installed.UnfitError: torch 2.9.1 is installed, and fxfuse needs torch>=2.11"
    assert error in done.stderr.splitlines()
