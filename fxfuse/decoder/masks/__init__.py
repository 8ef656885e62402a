"""The masks of a decoder's graph: what they are for every batch and length, and what is written in their place."""
