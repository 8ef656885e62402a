"""The shipped catalogue: one file per meaning, each with a `PATTERN`."""
