"""fxfuse: pattern fusion for PyTorch export graphs.

Regions of a graph of `torch.export` are recognised by what they compute. Each is replaced by one operator, once it is
proven that the operator computes the same, and each operator becomes one ONNX node.

`fuse` is the door that all others lead to (`prepass`, `fxfuse.onnx.export`, the plugin `fxfuse.onnx.enabled`, the
command `fxfuse`), and `fxfuse.fusion` is its story. `fxfuse.patterns.rms_norm` is a pattern to start with;
`fxfuse.proof` says why a rewrite is right. README.md has a map of the rooms.
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
