"""What a program writes in place. `lift` makes what outlives a call (KV caches first of all) inputs and outputs of the
graph; `functional` reads what does not outlive it as the values that it computes."""

from fxfuse.state.lift import Lifted, State, lift

__all__ = ["Lifted", "State", "lift"]
