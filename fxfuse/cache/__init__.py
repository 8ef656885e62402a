"""KV caches and other state: what a program writes in place becomes inputs and outputs of its graph."""

from fxfuse.cache.lift import Lifted, State, lift

__all__ = ["Lifted", "State", "lift"]
