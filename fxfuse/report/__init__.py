"""What was fused, what was not, and why: data (`entries`, `layer`), text, HTML (`html`, `drawing`), JSON (`record`)."""

from fxfuse.report.model import Entry, Report

__all__ = ["Entry", "Report"]
