"""What the kernels share inside Triton: rounding to a type, tanh.

`triton.jit` decides when a function is defined whether it is compiled or interpreted: where there is no GPU, call
`fxfuse.kernels.interpret()` before this module or a kernel is imported.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Do the kernels run in Triton's interpreter, in numpy on the CPU?"""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x to the nearest value of `dtype`, ties to even."""
    # The interpreter (Triton 3.7) cuts the low half of a float32 off where hardware rounds to the nearest bfloat16.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x.to(tl.float32))
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh of float32 or float64, without libdevice, which the interpreter does not have."""
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(x), 40.0)) + 1.0)
    far = tl.where(x < 0.0, -far, far)
    if x.dtype == tl.float64:
        return far
    # Near zero the difference above cancels: the first terms of the series instead, right to 2⁻²⁴ there.
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0))))
    return tl.where(s < 0.04, near, far)
