"""KV caches and other state: what a program writes in place becomes inputs and outputs of its graph."""

from fxfuse.state.lift import Lifted, State, lift

__all__ = ["Lifted", "State", "lift"]
