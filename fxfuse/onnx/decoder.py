"""The door to decoders with a cache; the story is in `fxfuse.decoder.export`."""

from fxfuse.decoder.export import export_decoder

__all__ = ["export_decoder"]
