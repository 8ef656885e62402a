"""The masks of a decoder's graph: `decided` tells what they are at every batch and length; the others write something
cheaper, or something that a runtime needs, in their place."""
