"""Capturing flex_attention, and what a captured block mask means.

Start with `fxfuse.patterns.flex_attention.capturing.capture`; the mask function itself is read in `fxfuse.recognise`.
"""
