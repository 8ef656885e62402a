"""fxfuse: pattern fusion for PyTorch export graphs.

Operators are recognised by what a region computes, every rewrite is proven, and each fused op becomes one ONNX node.
Start with `fuse`; the story is in `fxfuse.fusion`, a pattern in `fxfuse.patterns.rms_norm`.
"""

from fxfuse.installed import check_installed

check_installed()  # before anything below asks torch for what an older one has not

# ruff: noqa: E402
from fxfuse.errors import FxfuseError, FxfuseWarning, ParityError
from fxfuse.fusion import fuse, report, unfuse
from fxfuse.patterns.flex_attention.capturing.capture import flex_capture
from fxfuse.prepass import prepass
from fxfuse.recognise.by_example import pattern
from fxfuse.verification import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "FxfuseError",
    "FxfuseWarning",
    "ParityError",
    "Verification",
    "flex_capture",
    "fuse",
    "pattern",
    "prepass",
    "report",
    "unfuse",
    "verify",
]
