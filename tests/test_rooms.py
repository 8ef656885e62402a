"""Who may import whom: no circle between files, rooms in one direction, and an `import fxfuse` that asks for little."""

from __future__ import annotations

import subprocess
import sys

from tests.imports import circles, imported, imports

FLOORS = (
    {"errors", "files", "installed", "patches", "quiet", "torch_seams", "versions"},
    {"ops", "kernels"},
    {"graph"},
    {"state"},
    {"proof", "recognise"},
    {"patterns"},
    {"report", "options", "suppose", "notes", "judge", "run"},
    {"cache", "fusion", "prepass", "verification"},
    {"__init__"},
    {"pretrained", "repair", "parity", "onnx", "decoder", "package", "integrations"},
    {"runtime"},
    {"cli"},
    {"__main__"},
)
"""The rooms from the ground up. A file imports from its own floor and from those below, never from one above."""


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _floor(room: str) -> int:
    (found,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return found


def test_no_circle_between_files() -> None:
    found = list(circles(imports()))
    assert not found, f"these files import one another in a circle: {found}"


def test_rooms_keep_their_direction() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if _floor(_room(module)) < _floor(_room(other))
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_imports_are_read_wherever_they_stand() -> None:
    modules = dict.fromkeys(("a", "a.b", "a.b.c", "a.d"))
    source = """
from a.b import c, name
if TYPE_CHECKING:
    import a.d
def inside():
    from a import d, other
"""
    assert imported(source, modules) == {"a.b.c", "a.b", "a.d", "a"}


def test_a_circle_is_found() -> None:
    edges: dict[str, set[str]] = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert sorted(circles(edges)) == [["a", "b", "c"], ["e", "f"]]


def test_what_is_optional_is_imported_by_nobody_who_does_not_need_it() -> None:
    """Neither is what takes long: torch._dynamo takes a second."""
    code = "import sys, fxfuse, fxfuse.onnx, fxfuse.kernels; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    optional = {"transformers", "onnxruntime", "triton", "torchtune", "optimum", "jinja2", "torch._dynamo"}
    assert not optional & set(ran.stdout.split())
