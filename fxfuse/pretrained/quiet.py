"""Silence transformers' tables and progress bars; `fxfuse.pretrained.load` tells what was wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

from fxfuse.patches import Patch, Undo, applied

_quiet: ContextVar[bool] = ContextVar("fxfuse_quiet_transformers", default=False)


def quiet() -> AbstractContextManager[None]:
    """Within the block transformers logs only errors and draws no progress bars. That holds in all threads, because
    these settings of transformers are global.

    When the last of several blocks ends, the settings are as they were before the first.
    """
    return applied(_patches, _quiet)


def _patches() -> Iterator[Patch]:
    from transformers.utils import logging

    def apply() -> Undo:
        before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

        def undo() -> None:
            logging.set_verbosity(before)
            if bars:
                logging.enable_progress_bar()

        return undo

    yield "transformers.utils.logging", apply
