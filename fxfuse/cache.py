"""The door to state that a program writes in place, KV caches first of all; the story is in `fxfuse.state.lift`."""

from fxfuse.state import Lifted, State, lift

__all__ = ["Lifted", "State", "lift"]
