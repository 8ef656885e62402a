"""Every TorchTune family × variant × dtype: what fuses, and that it computes the same in PyTorch and ONNX Runtime.

One test exports its program once and asks everything of it; `Checks` reports all that failed, not only the first.
"""

from __future__ import annotations

import copy
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fxfuse
import fxfuse.onnx
from tests.torchtune import graphs
from tests.torchtune.models import CASES, UNREACHABLE, Case, Inputs, census

FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"float32": FLOAT, "float16": HALF, "bfloat16": BRAIN}

ALL_VARIANTS = ("llama3", "gemma2", "phi3", "llama3_2_vision_decoder_one_table")
"""Families whose every variant runs by default, in float32; the others' only variant then is the plain one."""
CAST = ("llama3", "gemma2", "phi3")
"""Families that run by default in half, too, and also after `.to(dtype)`, which takes the caches along."""


def matrix() -> Iterator[Any]:
    for case in CASES:
        for variant in case.variants:
            for name, dtype in DTYPES.items():
                default = (variant == "plain" or case.name in ALL_VARIANTS) and dtype is FLOAT
                default |= variant == "plain" and case.name in CAST
                marks = () if default else pytest.mark.slow
                yield pytest.param(case, variant, dtype, False, id=f"{case}-{variant}-{name}", marks=marks)
                if case.name in CAST and variant == "plain" and dtype is not FLOAT:
                    yield pytest.param(case, variant, dtype, True, id=f"{case}-{variant}-to_{name}")


@dataclass
class Checks:
    """Runs every check of a test, and then fails with all that went wrong."""

    failures: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            short = str(error).strip().split("\n\n")[0]
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.failures.append(f"{what}: {type(error).__name__} ({last.name}:{last.lineno}): {short[:2000]}")

    def finish(self) -> None:
        assert not self.failures, "\n".join([f"{len(self.failures)} failed", *self.failures])


# ---- running


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf.float() for leaf in pytree.tree_leaves(outputs)]


def run(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return leaves(model(*inputs[0], **inputs[1]))


def in_float(inputs: Inputs) -> Inputs:
    return pytree.tree_map(lambda x: x.float() if torch.is_floating_point(x) else x, inputs)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_onnx(runtime: onnxruntime.InferenceSession, inputs: Inputs) -> list[Tensor]:
    """Runs on the inputs in the order of the call: positional ones, then by name."""
    tensors = pytree.tree_leaves(inputs)
    slots = runtime.get_inputs()
    assert len(slots) == len(tensors), f"the graph takes {[slot.name for slot in slots]}"
    feeds = {slot.name: tensor.numpy() for slot, tensor in zip(slots, tensors, strict=True)}
    return [torch.from_numpy(output).float() for output in runtime.run(None, feeds)]


# ---- comparing


@dataclass(frozen=True)
class Error:
    """Distance from a reference, relative to the reference's own size."""

    rms: float
    worst: float


def distance(outputs: list[Tensor], reference: list[Tensor]) -> Error:
    assert [x.shape for x in outputs] == [y.shape for y in reference]
    assert all(x.isfinite().all() for x in outputs), "not finite"
    pairs = list(zip(outputs, reference, strict=True))
    rms = max(float((x - y).square().mean().sqrt() / y.square().mean().sqrt()) for x, y in pairs)
    return Error(rms, max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs))


def assert_close(outputs: list[Tensor], eager: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """In float32, equal to eager within rounding. In half, no more than twice as far from the exact result as eager.

    `exact` is what the same weights and inputs give in float32. The floor is one rounding of the result itself: an
    eager run may be lucky and hit the exact value.
    """
    if dtype is FLOAT:
        got = distance(outputs, eager)
        assert got.worst <= 1e-5, f"{got} from eager"
        return
    got, own = distance(outputs, exact), distance(eager, exact)
    floor = torch.finfo(dtype).eps / 2
    assert got.rms <= 2 * own.rms + floor, f"{got} from exact, eager {own}"
    assert got.worst <= 2 * own.worst + floor, f"{got} from exact, eager {own}"


def shapes(case: Case) -> dict[str, tuple[int, int | None]]:
    """The export shape, batch 1, and another batch and length, as far as the case leaves them dynamic."""
    found: dict[str, tuple[int, int | None]] = {"export shape": (2, None)}
    if "batch" in case.dynamic:
        found["batch 1"] = (1, None)
        found["batch 3"] = (3, 13 if "seq" in case.dynamic else None)
    if "seq" in case.dynamic:
        found["batch 1, shorter"] = (1, 5)
    return found


# ---- the matrix


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gc.collect()


@pytest.mark.parametrize(("case", "variant", "dtype", "cast"), matrix())
def test_torchtune(case: Case, variant: str, dtype: torch.dtype, cast: bool) -> None:
    check = Checks()
    model = case.model(dtype, cast=cast)
    exact_model = copy.deepcopy(model).float()
    samples = {what: case.inputs(*shape, variant, dtype) for what, shape in shapes(case).items()}
    eager = {what: run(model, inputs) for what, inputs in samples.items()}
    exact = {what: run(exact_model, in_float(inputs)) for what, inputs in samples.items()}
    expected = census(model, samples["export shape"])

    program = case.export(model, samples["export shape"])
    fused = fxfuse.fuse(program)
    counts = fxfuse.report(fused).counts

    with check("fused counts"):
        assert {name: counts.get(name, 0) for name in graphs.OPERATORS} == expected.counts
        assert graphs.fx_counts(fused) == expected.counts
    with check("key and value heads, FX"):
        attentions = graphs.fx_attentions(fused)
        assert tuple(map(graphs.fx_kv_heads, attentions)) == expected.kv_heads
        assert [graphs.fx_repeats(node) for node in attentions] == [[] for _ in attentions]
    module = fused.module()
    for what, inputs in samples.items():
        with check(f"PyTorch, {what}"):
            assert_close(run(module, inputs), eager[what], exact[what], dtype)

    if case.onnx:
        with check("ONNX export"):
            written = fxfuse.onnx.export(program, opset_version=24)
            with check("ONNX counts"):
                assert graphs.onnx_counts(written.model) == expected.counts
            with check("key and value heads, ONNX"):
                nodes = graphs.onnx_attentions(written.model)
                assert tuple(map(graphs.onnx_kv_heads, nodes)) == expected.kv_heads
                assert [graphs.onnx_repeats(node) for node in nodes] == [[] for _ in nodes]
            check_numbers(check, written.model_proto, samples, eager, exact, dtype)
        if variant == "plain" and dtype is FLOAT:
            with check("opset 23"):
                older = fxfuse.onnx.export(program, opset_version=23)
                assert older.model.opset_imports[""] == 23
                assert graphs.onnx_counts(older.model) == expected.counts
    check.finish()


def check_numbers(
    check: Checks,
    proto: onnx.ModelProto,
    samples: dict[str, Inputs],
    eager: dict[str, list[Tensor]],
    exact: dict[str, list[Tensor]],
    dtype: torch.dtype,
) -> None:
    """ONNX Runtime on the CPU; it has no kernels for bfloat16, so there the graph is checked, and run in float32."""
    if dtype is BRAIN:
        with check("ONNX checker"):
            onnx.checker.check_model(proto, full_check=True)
            onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
        proto = graphs.upcast(proto)
        samples = {what: in_float(inputs) for what, inputs in samples.items()}
    with check("loading into ONNX Runtime"):
        runtime = session(proto)
        for what, inputs in samples.items():
            with check(f"ONNX Runtime, {what}"):
                assert_close(run_onnx(runtime, inputs), eager[what], exact[what], dtype)


# ---- the rest


def test_export_of_the_module_itself() -> None:
    """The door takes the module as well, with its inputs and dynamic shapes."""
    case = next(case for case in CASES if case.name == "llama3")
    model, inputs = case.model(), case.inputs(variant="packed")
    written = fxfuse.onnx.export(model, inputs[0], kwargs=inputs[1], dynamic_shapes=case.dynamic_shapes(inputs))
    assert graphs.onnx_counts(written.model) == census(model, inputs).counts
    other = case.inputs(3, 13, "packed")
    assert_close(run_onnx(session(written.model_proto), other), run(model, other), [], FLOAT)


@pytest.mark.parametrize(
    ("case", "reason", "message"),
    [pytest.param(*row, id=f"{row[0]}-{'-'.join(row[0].dynamic)}") for row in UNREACHABLE],
)
def test_still_out_of_reach(case: Case, reason: str, message: str) -> None:
    """What torch.export itself refuses, for the reason given. When this fails, move the case into the matrix."""
    with pytest.raises(Exception, match=message):
        case.export(case.model(), case.inputs())


def test_fusion_embedding_is_still_out_of_reach_of_onnx() -> None:
    """`FusionEmbedding` selects and scatters by mask, for which torch.onnx has no translation."""
    case = next(case for case in CASES if not case.onnx)
    program = case.export(case.model(), case.inputs())
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(program, opset_version=24, verbose=False)
    assert "masked_select" in str(caught.value.__cause__)
