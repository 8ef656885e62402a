"""The package is whole: in the checkout's configuration and in a wheel, with the catalogue inside it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    apart = ROOT / "fxfuse" / "integrations" / "optimum_command"  # a distribution of its own
    found = {
        "fxfuse" + ".".join(["", *p.parent.relative_to(ROOT / "fxfuse").parts])
        for p in (ROOT / "fxfuse").rglob("*.py")
        if apart not in p.parents
    }
    return found | {
        "fxfuse.patterns" + ".".join(["", *p.parent.relative_to(ROOT / "patterns").parts])
        for p in (ROOT / "patterns").rglob("*.py")
    }


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_the_catalogue_is_the_top_level_folder() -> None:
    spec = importlib.util.find_spec("fxfuse.patterns.rms_norm")
    assert spec is not None and spec.origin is not None
    source = ROOT / "patterns" / "rms_norm" / "__init__.py"
    assert Path(spec.origin).read_text() == source.read_text()


def test_constraints_pin_every_dependency() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += [requirement for requirement in extra if not requirement.startswith("fxfuse[")]
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in requirement).split()[0] for requirement in wanted}
    assert names <= pinned


@pytest.mark.slow
def test_a_wheel_holds_the_catalogue_and_the_type_marker(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("fxfuse-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    patterns = [f"patterns/{name}/__init__.py" for name in ("rms_norm", "rotary_embedding", "attention")]
    for path in ("py.typed", *patterns, "report/schema.json", "report/templates/page.html"):
        assert (site / "fxfuse" / path).is_file(), path
    # From a folder that is no checkout, with the wheel's contents before anything that is installed.
    program = "import fxfuse, fxfuse.patterns.rms_norm as p; print(fxfuse.__file__, p.__file__)"
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert all(Path(path).is_relative_to(site) for path in ran.stdout.split())
