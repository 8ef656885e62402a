"""Keys of `Node.meta` under which fxfuse notes on a node how it came into the graph."""

from __future__ import annotations

INSERTED = "fxfuse_inserted"
"""A fused operator's node, or one that a rewrite put in along with it."""
STANDS_FOR = "fxfuse_stands_for"
"""Of a node that was inserted for a value: its own name, for metadata is copied, and that of the value's node."""
FUNCTIONAL = "fxfuse_functional"
"""Put in to read a write in place, or a call that was taken apart, as what it computes."""
DETACHED = "fxfuse_detached"
"""Of a node that detaches what was computed under `no_grad`: no region goes across it, for none has gradients there."""
LOWERED = "fxfuse_lowered"
"""Of a node that autocast computes in a lower type than the model is in: that type."""
