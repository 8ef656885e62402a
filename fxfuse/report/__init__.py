"""What was fused, what was not, and why: data (`model`, `layer`), as text, HTML (`html`, `drawing`) and JSON (`record`)."""

from fxfuse.report.model import Entry, Report

__all__ = ["Entry", "Report"]
