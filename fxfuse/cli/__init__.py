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
    """Runs one command; returns its exit code."""
    arguments = parser().parse_args(argv)
    # Tables and progress go to stdout and stderr of this moment: a test or a caller may have replaced them.
    out, err = Console(file=sys.stdout, soft_wrap=False), Console(file=sys.stderr, soft_wrap=True)
    try:
        with warnings.catch_warnings():
            # Deprecations inside torch and onnxscript, which the user of a command cannot act on.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            # Inputs that share a symbol are given its one name.
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
