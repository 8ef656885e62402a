"""Which file of the project imports which, read from the source: at the top, inside functions and for types alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOUSES = {"fxfuse": ROOT / "fxfuse", "fxfuse.patterns": ROOT / "patterns"}
"""The packages, and where their source stands; `patterns` is installed as `fxfuse.patterns`."""
_NO_ROOM = ("fxfuse.integrations.optimum_command",)
"""A distribution of its own, of namespace packages."""


def sources() -> dict[str, Path]:
    """Every module of the project by its name: ``"fxfuse.proof.prove"``, and ``"fxfuse.proof"`` for its __init__."""
    found = {}
    for package, folder in HOUSES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            if not name.startswith(_NO_ROOM):
                found[name] = path
    return found


def imported(source: str, modules: Mapping[str, object]) -> set[str]:
    """The modules among `modules` that this source imports anywhere, by whichever spelling."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports are absolute here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in modules}
            if inner - set(modules):  # a name that the module itself has
                found.add(node.module)
    return {name for name in found if name in modules}


def imports() -> dict[str, set[str]]:
    """For each module of the project those that it imports, itself left out."""
    modules = sources()
    return {name: imported(path.read_text(encoding="utf-8"), modules) - {name} for name, path in modules.items()}


def circles(edges: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Groups of modules that each reach one another, by Tarjan's algorithm."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in numbers:
                yield from visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], numbers[other])
        if lowest[name] == numbers[name]:
            place = stack.index(name)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                yield sorted(group)

    for name in sorted(edges):
        if name not in numbers:
            yield from visit(name)
