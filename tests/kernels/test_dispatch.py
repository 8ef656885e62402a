"""Which implementation runs, and what is said where no kernel does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fxfuse import kernels
from fxfuse.errors import FxfuseError
from fxfuse.kernels import table
from fxfuse.kernels.switch import kernels_wanted, use_kernels
from fxfuse.ops.attention.arguments import Attributes
from fxfuse.ops.attention.backward import composite, sdpa_gradients
from fxfuse.ops.attention.math import Problem, gradients
from fxfuse.ops.attention.sdpa import has_fused_kernel
from tests.kernels.device import DEVICE

ops = torch.ops.fxfuse
X, W = torch.randn(3, 8, device=DEVICE), torch.randn(8, device=DEVICE)

on_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the kernels are compiled for it")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, by operator."""
    ran: list[str] = []
    for name, kernel in list(table.kernels().items()):

        def function(*args: object, name: str = name, kernel: table.Kernel = kernel, **kwargs: object) -> object:
            ran.append(name)
            return kernel.function(*args, **kwargs)

        monkeypatch.setitem(table.kernels(), name, kernel._replace(function=function))
    return ran


@on_the_cpu
def test_the_cpu_runs_composites_unless_told_otherwise(counted: list[str]) -> None:
    ops.rms_norm(X, W)
    assert not counted
    with use_kernels("always"):
        ops.rms_norm(X.requires_grad_(), W).sum().backward()
        with use_kernels("never"):
            ops.rms_norm(X, W)
    assert counted == ["rms_norm", "rms_norm_backward"]
    X.requires_grad_(False)


def test_the_switch_is_put_back() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(RuntimeError, match="mine"), use_kernels("always"):
        assert kernels_wanted(cpu)
        raise RuntimeError("mine")
    assert kernels_wanted(cuda) and not kernels_wanted(cpu)
    with use_kernels("never"):
        assert not kernels_wanted(cuda)


def test_long_rows_fall_back(counted: list[str]) -> None:
    x = torch.randn(1, 65537, device=DEVICE)
    why = "a row of 65537 elements is longer than 65536"
    with use_kernels("always") as declined:
        y = ops.rms_norm(x, W[:1])
    assert declined == [("rms_norm", why)] and not counted
    with use_kernels("never"):
        torch.testing.assert_close(y, ops.rms_norm(x, W[:1]))
    with pytest.raises(FxfuseError, match=why):
        kernels.run("rms_norm", x, W[:1])


def test_wide_heads_fall_back() -> None:
    q = torch.randn(1, 1, 2, 257)
    assert kernels.unsupported("attention", q, q, q) == "heads of 257 elements are wider than 256 (torch.float32)"
    q = q[..., :129].double()
    assert kernels.unsupported("attention", q, q, q) == "heads of 129 elements are wider than 128 (torch.float64)"


def test_wrong_arguments_are_refused_as_the_operator_does() -> None:
    with pytest.raises(FxfuseError, match="does not broadcast") as caught:
        kernels.run("rms_norm", X, W[:3])
    assert caught.value.where == "scale"
    with pytest.raises(FxfuseError, match="has no kernel") as caught:
        kernels.run("attention_with_qk", X, X, X)
    assert "tensor_scatter" in str(caught.value.hint)


def test_missing() -> None:
    assert kernels.missing(DEVICE) is None
    if DEVICE.type == "cpu":
        assert kernels.missing("cuda") == "there is no GPU"
    assert kernels.missing("mps") == "Triton is not tried on mps"


def python(program: str, *arguments: str) -> str:
    """What a fresh interpreter prints, one that nobody told to interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_without_triton_everything_else_works() -> None:
    program = """
import sys
sys.modules["triton"] = None  # any import of it raises ImportError
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch, fxfuse
from fxfuse import kernels
from fxfuse.kernels.switch import use_kernels
x = torch.randn(2, 8, requires_grad=True)
with use_kernels("always") as declined:
    torch.ops.fxfuse.rms_norm(x, torch.ones(8)).sum().backward()
print(declined, kernels.missing("cpu"))
try:
    kernels.run("rms_norm", x, x)
except fxfuse.FxfuseError as error:
    print(error)
"""
    printed = python(program)
    assert "('rms_norm', 'Triton is not installed')" in printed
    assert "no Triton kernel runs here: Triton is not installed" in printed


def test_interpret_comes_before_triton_is_imported() -> None:
    program = """
import sys, fxfuse, fxfuse.cli, fxfuse.onnx, fxfuse.parity
from fxfuse import FxfuseError, kernels
print('triton' in sys.modules, kernels.missing('cpu'))
if sys.argv[1:] == ['late']:
    import triton.language
try:
    kernels.interpret()
    print(kernels.missing('cpu'))
except FxfuseError as error:
    print(error)
"""
    before = "False Triton compiles for GPUs; on the CPU it has an interpreter"
    assert python(program).splitlines() == [before, "None"]
    late = python(program, "late")
    assert "imported for the compiler already" in late and "TRITON_INTERPRET=1" in late


def problem(Sq: int, T: int, Hq: int = 4, Hkv: int = 2, device: torch.device | str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, s, 8, generator=generator).to(device) for h, s in ((Hq, Sq), (Hkv, T), (Hkv, T)))
    return Problem(q, k, v, None, None, 0)


@pytest.mark.parametrize("a", [Attributes(), Attributes(is_causal=1), Attributes(scale=0.2)], ids=str)
def test_sdpas_own_gradients_are_the_textbooks(a: Attributes) -> None:
    p = problem(5, 5)
    grad = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(sdpa_gradients(p, a, grad)[:3], gradients(p, a, grad, None)[:3], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("p", "a"),
    [
        (problem(3, 5), Attributes(softcap=2.0)),
        (problem(3, 5)._replace(lengths=torch.tensor([5, 2])), Attributes()),
        (problem(3, 5), Attributes(softmax_precision=11)),
        (problem(3, 0), Attributes()),
    ],
    ids=["soft-cap", "lengths", "float64 softmax", "no keys"],
)
def test_what_sdpa_has_no_fast_path_for(p: Problem, a: Attributes, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxfuse.ops.attention.sdpa as module

    monkeypatch.setattr(module, "can_use_flash_attention", lambda params: True)

    class OnCuda(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    on_gpu = p._replace(Q=p.Q.as_subclass(OnCuda))  # type: ignore[arg-type]
    assert has_fused_kernel(problem(3, 5)._replace(Q=problem(3, 5).Q.as_subclass(OnCuda)), Attributes(), 5)  # type: ignore[arg-type]
    assert not has_fused_kernel(on_gpu, a, p.K.shape[2])
    assert not has_fused_kernel(problem(3, 5), Attributes(), 5), "on the CPU there is none"


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def test_backward_operators_keep_what_their_fakes_promise() -> None:
    p = problem(3, 5, device=DEVICE)
    attributes = {"offset": 1, "is_causal": 1, "scale": None, "softcap": 2.0}
    checks = ("test_schema", "test_faketensor")
    for mask_gradient in (False, True):
        kwargs = {**attributes, "mask_gradient": mask_gradient}
        args = (p.Q, p.K, p.V, rand(3, 5), torch.tensor([5, 3], device=DEVICE), rand(2, 4, 3, 8))
        torch.library.opcheck(ops.attention_backward.default, args, kwargs, test_utils=checks)
        with use_kernels("always"):
            torch.library.opcheck(ops.attention_backward.default, args, kwargs, test_utils=checks)
            found = ops.attention_backward(*args, **kwargs)
        for ours, theirs in zip(found, composite(*args, **kwargs), strict=True):
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs)
    norm = (rand(2, 3, 8), rand(3, 2, 8).transpose(0, 1), rand(3, 1))
    kwargs = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
    rotary = (rand(2, 4, 3, 8), rand(7, 4), rand(7, 4), torch.tensor([[1, 2, 3], [4, 4, 0]], device=DEVICE))
    for mode in ("never", "always"):
        with use_kernels(mode):  # type: ignore[arg-type]
            torch.library.opcheck(ops.rms_norm_backward.default, norm, kwargs, test_utils=checks)
            torch.library.opcheck(ops.rotary_embedding_backward.default, rotary, {}, test_utils=checks)
