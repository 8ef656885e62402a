"""What can be seen of compiled kernels without a GPU, printed as JSON; a process of its own, for Triton must compile.

python -m tests.kernels.without_gpu compile 90 bfloat16     every kernel, compiled down to machine code for sm_90
python -m tests.kernels.without_gpu trace                   what torch.compile and torch.export see of them
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fxfuse.ops
from fxfuse.kernels import dispatch
from fxfuse.kernels.table import kernels
from fxfuse.ops.attention.arguments import Attributes, Inputs, check
from fxfuse.ops.attention.kernels import launching as attention
from fxfuse.ops.attention.math import Problem
from fxfuse.ops.rms_norm import kernels as rms_norm
from fxfuse.ops.rotary_embedding import kernels as rotary_embedding
from fxfuse.ops.tensor_scatter import kernels as tensor_scatter
from fxfuse.parity.matrix import calls

assert fxfuse.ops.OPS
ops = torch.ops.fxfuse


class Driver:
    """Says for which GPU to compile, where there is none to ask."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiler:
    """Stands in for a kernel: compiles it as it would be started, and starts nothing."""

    compiled: ClassVar[list[dict[str, Any]]] = []
    label = ""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.note(self.kernel.warmup(*args, grid=grid, **kwargs))

    def note(self, binary: Any) -> None:
        ptx = binary.asm["ptx"]
        record = {
            "kernel": f"{self.kernel.fn.__module__}.{self.kernel.__name__}",
            "case": Compiler.label,
            "shared": binary.metadata.shared,
            "cubin": len(binary.asm["cubin"]),
            "vector loads": ptx.count(".v4.b32"),
            "tensor cores": ptx.count("mma"),
        }
        self.compiled.append(record)


def compile_matrix(op: str) -> list[dict[str, Any]]:
    """The kernel of one operator for calls of its matrix's sample: strides and sizes of 1 are compiled for.

    Every call, but of attention, which takes seconds each, every fourth.
    """
    for call in itertools.islice(calls(op, "pairs"), 0, None, 4 if op == "attention" else 1):
        Compiler.label = str(call)
        kernels()[op].function(*call.args, **call.kwargs)
    return Compiler.compiled


def compile_all(dtype: torch.dtype, sizes: str) -> list[dict[str, Any]]:
    """Every kernel as its launcher would start it; of `all` sizes, or of `one`."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    for width in (64, 4096, 65536) if sizes == "all" else (4096,):
        Compiler.label = f"row of {width}"
        rms_norm.forward(zeros(32, width), zeros(width))
        rms_norm.backward(zeros(32, width), zeros(32, width), zeros(width))
    for interleaved in (0, 1):
        Compiler.label = f"interleaved={interleaved}"
        x, cache = zeros(2, 16, 8 * 128), zeros(2, 16, 64)
        rotary_embedding.forward(x, cache, cache, num_heads=8, interleaved=interleaved)
        partial = (zeros(2, 8, 16, 128), zeros(32, 32), zeros(32, 32), torch.zeros(2, 16, dtype=torch.int64))
        rotary_embedding.backward(*partial, interleaved=interleaved, rotary_embedding_dim=64)
    Compiler.label = "circular"
    tensor_scatter.forward(
        zeros(2, 8, 64, 128), zeros(2, 8, 1, 128), torch.zeros(2, dtype=torch.int64), mode="circular"
    )
    for size in (16, 64, 128, 256) if sizes == "all" else (128,):
        if size > attention.WIDEST[dtype.itemsize]:
            continue
        Compiler.label = f"heads of {size}"
        q, k = zeros(1, 8, 256, size), zeros(1, 2, 256, size)
        masked = Inputs(q, k, k, zeros(256, 512), k, k)
        a = Attributes(is_causal=1, softcap=20.0)
        attention.forward(masked, a, check(masked, a))
        attention.gradients(
            Problem(q, k, k, zeros(256, 256), torch.zeros(1, dtype=torch.int64), 0), a, q, mask_gradient=True
        )
    return Compiler.compiled


class Everything(torch.nn.Module):
    """The operators that have a kernel, and the backward passes."""

    def forward(self, x: Tensor, w: Tensor, cos: Tensor, q: Tensor, k: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        attributes = {"offset": 0, "is_causal": 1, "scale": None, "softcap": 2.0, "mask_gradient": False}
        return (
            ops.rms_norm(x, w, epsilon=1e-6),
            ops.rotary_embedding(x, cos, cos, num_heads=4, interleaved=1),
            ops.attention(q, k, k, softcap=3.0, is_causal=1),
            ops.tensor_scatter(k, k, indices),
            *ops.rms_norm_backward(x, x, w, axis=-1, epsilon=1e-6, stash_type=1),
            ops.rotary_embedding_backward(x, cos, cos, None, num_heads=4),
            *ops.attention_backward(q, k, k, None, None, q, **attributes),
        )


def trace() -> dict[str, list[str]]:
    """The calls in the graphs that AOTAutograd and torch.export make for tensors on a GPU."""
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._subclasses.fake_tensor import FakeTensorMode

    dispatch.missing = lambda device: None  # type: ignore[assignment]
    with FakeTensorMode():
        half = {"dtype": torch.bfloat16, "device": "cuda"}
        shapes = [(2, 8, 64), (64,), (2, 8, 8), (2, 4, 8, 16), (2, 2, 8, 16)]
        args: list[Tensor] = [torch.empty(shape, **half) for shape in shapes]
        args.append(torch.empty(2, dtype=torch.int64, device="cuda"))
        module = Everything()
        traced = aot_export_joint_simple(lambda *given: module(*given), args, trace_joint=False)
        exported = torch.export.export(module, tuple(args)).run_decompositions()
    calls = {"compile": traced.graph, "export": exported.graph}
    return {name: [str(n.target) for n in g.nodes if n.op == "call_function"] for name, g in calls.items()}


def main() -> None:
    what, *rest = sys.argv[1:]
    driver.set_active(Driver(int(rest[0]) if what == "compile" else 90))
    if what == "trace":
        print(json.dumps(trace()))
        return
    for module in (rms_norm, rotary_embedding, tensor_scatter, attention):
        module.wrapped = Compiler  # type: ignore[attr-defined]
    print(json.dumps(compile_matrix(rest[0]) if what == "matrix" else compile_all(getattr(torch, rest[1]), rest[2])))


if __name__ == "__main__":
    main()
