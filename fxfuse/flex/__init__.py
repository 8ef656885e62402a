"""Capturing flex_attention, and what a captured block mask means.

Start with `fxfuse.flex.capture`; the mask function itself is read in `fxfuse.recognise`.
"""
