"""Is what is installed within the bounds that this fxfuse has for it? They stand in pyproject.toml, and nowhere else.

>>> import fxfuse
fxfuse.installed.UnfitError: torch 2.9.1 is installed, and fxfuse needs torch>=2.11
  hint: pip install 'torch>=2.11'

An extra's packages are looked at where they are first needed. What is not installed is missed there, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from fxfuse.errors import FxfuseError


class UnfitError(FxfuseError, ImportError):
    """A package is installed in a release that fxfuse does not work with."""


def check_installed(extra: str = "") -> None:
    """Looks at what fxfuse requires, or what `extra` adds to that.

    Raises:
        UnfitError: a package is older or newer than it may be; the message names each, and what is needed.
    """
    unfit = list(_unfit(extra))
    if unfit:
        needs = f"fxfuse[{extra}]" if extra else "fxfuse"
        raise UnfitError(
            "; ".join(f"{r.name} {found} is installed, and {needs} needs {r.name}{r.specifier}" for r, found in unfit),
            hint="pip install " + " ".join(f"'{r.name}{r.specifier}'" for r, _ in unfit),
        )


def _unfit(extra: str) -> Iterator[tuple[Requirement, str]]:
    try:
        texts = requires("fxfuse") or []
    except PackageNotFoundError:  # a checkout on the path, which nobody installed
        return
    for requirement in map(Requirement, texts):
        of_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if requirement.name == "fxfuse" or of_extra != bool(extra) or not holds:
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield requirement, found
