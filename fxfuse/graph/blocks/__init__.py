"""Blocks that run under another grad or autocast mode, seen through while regions are matched."""
