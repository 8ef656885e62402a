"""A fused program proven against its original again: `fxfuse.verify`. The story is in `programs.py`."""

from fxfuse.verification.programs import Verification, Verified, verify

__all__ = ["Verification", "Verified", "verify"]
