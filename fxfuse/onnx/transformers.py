"""The door to transformers' exporters: importing this registers the format ``"fxfuse"``.

The story is in `fxfuse.integrations.transformers`.
"""

from fxfuse.integrations.transformers import NAME, FxfuseConfig, FxfuseExporter

__all__ = ["NAME", "FxfuseConfig", "FxfuseExporter"]
