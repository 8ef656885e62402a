"""The command line: ``fxfuse export``, ``inspect``, ``repair``, ``verify``, ``patterns`` and ``parity``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from rich.console import Console

from fxfuse.cli.arguments import parser
from fxfuse.errors import FxfuseError, ParityError

OK, BAD_INPUT, NO_PARITY = 0, 2, 3
"""Exit codes. Anything else is a defect of fxfuse or of what it stands on, and shows its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    # Consoles are made here, not at import, because a test or a caller may have replaced stdout and stderr since.
    out, err = Console(file=sys.stdout, soft_wrap=False), Console(file=sys.stderr, soft_wrap=True)
    try:
        with warnings.catch_warnings():
            # Deprecations inside torch and onnxscript, which the user of a command cannot act on.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            # torch warns that inputs with one symbol share its name, which is what is wanted.
            warnings.filterwarnings("ignore", "# The axis name: .* shares the same shape constraints")
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            arguments.run(arguments, out, err)
    except ParityError as error:
        err.print(f"fxfuse: {error}", style="bold red", markup=False, highlight=False)
        return NO_PARITY
    except FxfuseError as error:
        err.print(f"fxfuse: {error}", style="red", markup=False, highlight=False)
        return BAD_INPUT
    return OK
