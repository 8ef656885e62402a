"""A user's pattern: a plain function says what is meant, an op replaces whatever computes the same.

    @fxfuse.pattern(replacement=torch.ops.mine.geglu)
    def geglu(x, w_gate, w_up):
        return F.gelu(x @ w_gate.T) * (x @ w_up.T)

A region matches when it gives the same values as the function on the same inputs: its tensors are bound to the
parameters in whichever order fits, parameters with a number as default to the numbers written in the region.
`patterns/README.md` tells how to write one.
"""

from fxfuse.recognise.by_example.decorator import pattern
from fxfuse.recognise.by_example.example import Example

__all__ = ["Example", "pattern"]
