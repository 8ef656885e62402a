"""The door to folders that generate text; the story is in `fxfuse.package.write`."""

from fxfuse.package.write import facts, write_package

__all__ = ["facts", "write_package"]
