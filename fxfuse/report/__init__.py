"""What was fused, what was not, and why: data (`model`) and text (`text`)."""

from fxfuse.report.model import Entry, Report

__all__ = ["Entry", "Report"]
