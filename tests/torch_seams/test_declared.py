"""Every private name of torch is declared once, looked up by one test, and reached for nowhere else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from fxfuse.torch_seams import Seam, moved
from fxfuse.torch_seams.declared import TORCH
from fxfuse.versions import PRIVATE
from tests.imports import sources

HOME = "fxfuse.torch_seams"
_OF_TUPLES = {"_replace", "_asdict", "_fields"}
"""What Python's own named tuples have; they are public."""


def test_this_torch_has_moved_nothing() -> None:
    assert moved() == []


@pytest.mark.parametrize("seam", PRIVATE, ids=lambda seam: seam.name)
def test_other_libraries_have_moved_nothing(seam: Seam) -> None:
    pytest.importorskip(seam.name.partition(".")[0])
    assert moved([seam]) == []


def test_a_move_is_named_with_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.utils._pytree, "tree_leaves_with_path")
    monkeypatch.delattr(torch.fx.experimental.symbolic_shapes.ShapeEnv, "suppress_guards")
    found = moved([seam for seam in TORCH if "pytree" in seam.name or "suppress" in seam.name])
    assert [line.partition(":")[0].partition(" (")[0] for line in found] == [
        "torch.utils._pytree.tree_leaves_with_path",
        "torch.fx.experimental.symbolic_shapes.ShapeEnv.suppress_guards",
    ]
    assert found[0].endswith(": " + next(seam.why for seam in TORCH if seam.name == "torch.utils._pytree"))


@pytest.mark.parametrize("name", ["torch._nowhere.at_all", "torch._ops.NoSuchOperator", "no_such_library.name"])
def test_a_name_that_never_was_is_named(name: str) -> None:
    (line,) = moved([Seam(name, "nothing")])
    assert line.startswith(f"{name} (") and line.endswith("): nothing")


def test_importing_fxfuse_says_what_a_new_torch_has_moved() -> None:
    code = "import torch._ops; del torch._ops.HigherOrderOperator; import fxfuse"
    # What torch itself imports has imported the name already: only fxfuse asks the module again.
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "UnfitError: torch" in ran.stderr
    assert "\n  torch._ops.HigherOrderOperator: the types of a node's target" in ran.stderr


# ---- one place


def _private(path: str) -> bool:
    parts = path.split(".")
    underscored = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return parts[0] == "torch" and (underscored or path.startswith("torch.fx.experimental"))


def _reached_for(source: str) -> Iterator[str]:
    """Private names of torch that this source imports, reads or names in a text."""
    tree = ast.parse(source)
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            own.add(node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _private(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{a.name}" for a in node.names if _private(f"{node.module}.{a.name}"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            written = ast.unparse(node)
            operator = re.match(r"(torch\.ops\.)?aten\._\w+$", written)  # ATen's operators are public under any name
            if node.attr not in own | _OF_TUPLES and not operator and not written.startswith("sys."):
                yield written
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = getattr(node.args[1], "value", "") if len(node.args) > 1 else ""
            if re.match(r"_[a-z]", str(name)) and name not in _OF_TUPLES:
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield from (word for word in re.findall(r"torch(?:\.\w+)+", node.value) if _private(word))


def test_private_names_of_torch_stand_in_one_place() -> None:
    found = {
        f"{module}: {name}"
        for module, path in sources().items()
        if not f"{module}.".startswith(f"{HOME}.")
        for name in _reached_for(path.read_text(encoding="utf-8"))
    }
    assert not found, "to be declared in fxfuse/torch_seams:\n" + "\n".join(sorted(found))


@pytest.mark.parametrize(
    "source",
    [
        "import torch._ops",
        "from torch.utils import _pytree",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "torch._C._functorch.maybe_current_level()",
        "program._guards_code = []",
        "schema = getattr(node.target, '_schema', None)",
        "logger = logging.getLogger('torch._guards')",
    ],
)
def test_each_way_of_reaching_is_seen(source: str) -> None:
    assert list(_reached_for(source))


def test_whatever_is_imported_is_declared() -> None:
    declared = {seam.name for seam in TORCH} | {f"{s.name}.{member}" for s in TORCH for member in s.members}
    for name in ("names", "parts", "threads"):
        source = sources()[f"{HOME}.{name}"].read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for path in (f"{node.module}.{alias.name}" for alias in node.names):
                    assert not _private(path) or path in declared or any(d.startswith(path) for d in declared), path


def test_the_members_of_pytree_that_are_used_are_declared() -> None:
    (declared,) = (set(seam.members) for seam in TORCH if seam.name == "torch.utils._pytree")
    used = {
        node.attr
        for path in sources().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pytree"
    }
    assert used == declared
