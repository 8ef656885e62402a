"""Rows whose mask hides every key: ONNX Runtime gives what eager PyTorch gives, and 0 where that is nan."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxfuse.onnx
from fxfuse.onnx.translate.lowest import LOWEST, NEXT, without_lowest
from fxfuse.parity import require_onnxruntime
from fxfuse.parity.ort import onnxruntime_outputs

B, H, G, D = 2, 4, 2, 8
INF = float("inf")
MIN = float(LOWEST)

opsets = pytest.mark.parametrize("opset", [23, 24])


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    return torch.softmax(q @ k.mT * 0.3 + mask, -1) @ v


class Layers(nn.Module):
    """Two attentions with the same mask; `x` is [B, H + 2·G, S, D]."""

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return given

    def forward(self, x: Tensor, given: Tensor) -> Any:
        q, k, v = x.split([H, G, G], 1)
        for _ in range(2):
            q = eager(q, k, v, self.mask(x, given))
        return q


class Sliced(Layers):
    """As transformers sliced the mask in every layer."""

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return given[:, :, :, : x.shape[2]]


class Filled(Layers):
    """Of booleans; as transformers' eager masks."""

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return torch.where(given, torch.tensor(0.0), torch.finfo(torch.float32).min)


class Inverted(Layers):
    """As BERT has it: 1 where a key is kept."""

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        return (1.0 - given.float()) * torch.finfo(torch.float32).min


class Summed(Layers):
    """Causal and padding, each with the lowest number: a key that both hide gets -inf."""

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        full = torch.full((x.shape[2], x.shape[2]), torch.finfo(torch.float32).min)
        return torch.triu(full, 1) + Filled.mask(self, x, given)  # type: ignore[arg-type]


class Biased(Layers):
    """A learned bias, and what hides: T5."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(16, H)

    def mask(self, x: Tensor, given: Tensor) -> Tensor:
        i = torch.arange(x.shape[2])
        bias = self.bias((i[:, None] - i).clamp(-8, 7) + 8).permute(2, 0, 1).unsqueeze(0)
        return bias + Filled.mask(self, x, given)  # type: ignore[arg-type]


class Reported(Filled):
    """The mask is an output as well: it keeps its numbers."""

    def forward(self, x: Tensor, given: Tensor) -> Any:
        return super().forward(x, given), self.mask(x, given)


class Shared(Filled):
    """The number that hides is somebody else's as well."""

    def forward(self, x: Tensor, given: Tensor) -> Any:
        return super().forward(x, given), torch.where(x > 0, x, torch.finfo(torch.float32).min)


def inputs(mask: Tensor, S: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, H + 2 * G, S, D, generator=torch.Generator().manual_seed(S)), mask


def causal(hide: float, S: int) -> Tensor:
    return torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1).bool(), hide)


def left_padded(S: int) -> Tensor:
    """Which keys are kept, [B, 1, 1, S]: the second row begins with two that are not."""
    kept = torch.ones(B, 1, 1, S, dtype=torch.bool)
    kept[1, ..., :2] = False
    return kept


def kept(S: int) -> Tensor:
    """Causal and padding, bool [B, 1, S, S]; the first two queries of the second row see nothing."""
    return left_padded(S) & (causal(1.0, S) == 0)


def float_masks(S: int) -> dict[str, Tensor]:
    """[B, 1, S, S]."""
    masks = {f"causal {hide:g}": causal(hide, S).expand(B, 1, S, S).clone() for hide in (-1e4, -1e9, MIN / 2, MIN)}
    for hide in (-1e4, -1e9, MIN / 2, float(NEXT), MIN, -INF):
        mask = torch.randn(B, 1, S, S, generator=torch.Generator().manual_seed(7))
        mask[0, :, 1] = hide
        mask[1] = hide
        masks[f"rows of {hide:g}"] = mask
    padding = torch.zeros(B, 1, 1, S).masked_fill(~left_padded(S), MIN)
    masks["left padding, transformers' sum"] = causal(MIN, S) + padding
    masks["left padding, where"] = torch.zeros(B, 1, S, S).masked_fill(~kept(S), MIN)
    mixed = torch.full((B, 1, S, S), MIN)
    mixed[..., 2:] = -INF
    mixed[1, :, 0, 1] = -INF
    masks["lowest in front, -inf behind"] = mixed
    one = torch.full((B, 1, S, S), MIN)
    one[..., 1] = -3e38
    masks["one key kept, by -3e38"] = one
    return masks


def export(model: nn.Module, given: tuple[Tensor, Tensor], opset: int, **shapes: Any) -> torch.onnx.ONNXProgram:
    axes = {2: Dim.AUTO}, {3: Dim.AUTO} if given[1].shape[2] == 1 else {2: Dim.AUTO, 3: Dim.AUTO}
    return fxfuse.onnx.export(model.eval(), given, dynamic_shapes=axes, opset_version=opset)


def count(program: torch.onnx.ONNXProgram, *operators: str) -> list[int]:
    found = [node.op_type for node in program.model.graph]
    return [found.count(operator) for operator in operators]


def check(program: torch.onnx.ONNXProgram, model: nn.Module, given: tuple[Tensor, Tensor], name: str) -> None:
    expected = model(*given)
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = onnxruntime_outputs(program, given)
    for one, wanted in zip(actual, expected, strict=True):
        # Where every key has -inf, softmax is nan; the operator gives 0, to the second layer's queries as well.
        wanted = wanted.nan_to_num(0.0) if "-inf" in name else wanted
        torch.testing.assert_close(one, wanted.detach(), rtol=1e-5, atol=2e-6, msg=lambda m: f"{name}: {m}")


@opsets
def test_masks_of_unknown_numbers(opset: int) -> None:
    program = export(Layers(), inputs(float_masks(5)["causal -10000"], 5), opset)
    assert count(program, "Attention", "Equal", "Where") == [2, 1, 1], "once for both layers"
    for S in (5, 7):
        for name, mask in float_masks(S).items():
            check(program, Layers(), inputs(mask, S), name)


def test_a_mask_that_every_layer_slices() -> None:
    program = export(Sliced(), inputs(float_masks(5)["causal -10000"], 5), 24)
    assert count(program, "Attention", "Equal", "Where") == [2, 1, 1]
    for name, mask in float_masks(6).items():
        check(program, Sliced(), inputs(mask, 6), name)


@opsets
@pytest.mark.parametrize("model", [Filled(), Inverted(), Summed(), Biased()], ids=lambda m: type(m).__name__)
def test_masks_of_known_numbers_cost_no_node(model: Layers, opset: int) -> None:
    mask = left_padded if isinstance(model, Summed) else kept
    program = export(model, inputs(mask(5), 5), opset)
    masks = {node.inputs[3] for node in program.model.graph if node.op_type == "Attention"}
    assert all(mask is not None and mask.dtype == ir.DataType.FLOAT for mask in masks)
    assert count(program, "Attention", "Equal") == [2, 0]
    assert all(MIN not in tensor for tensor in constants(program)), "written anew, and the old one left out"
    for S in (5, 8):
        given = mask(S)
        check(program, model, inputs(given, S), "left padding")
        given[0] = False
        check(program, model, inputs(given, S), "a whole sequence dropped")


def constants(program: torch.onnx.ONNXProgram) -> list[np.ndarray]:
    values = program.model.graph.initializers.values()
    return [value.const_value.numpy() for value in values if value.const_value is not None]


def test_a_mask_in_a_buffer() -> None:
    class Buffered(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("hidden", torch.full((1, 1, 9, 9), MIN).tril(-1), persistent=False)

        def mask(self, x: Tensor, given: Tensor) -> Tensor:
            return self.hidden[..., : x.shape[2], : x.shape[2]] + given

    hidden = torch.zeros(B, 1, 1, 5)
    plain = export(Filled(), inputs(kept(5), 5), 24)
    program = export(Buffered(), inputs(hidden, 5), 24)
    assert count(program, "Equal") == [1], "the sum with an input can be anything"
    assert count(plain, "Equal") == [0]
    hidden[1] = MIN
    check(program, Buffered(), inputs(hidden, 5), "lowest, and -inf where both hide")


def test_numbers_that_others_read_stay() -> None:
    program = export(Reported(), inputs(kept(5), 5), 24)
    assert count(program, "Equal", "Where") == [1, 2], "the mask is an output"
    check(program, Reported(), inputs(kept(6), 6), "output")
    program = export(Shared(), inputs(kept(5), 5), 24)
    assert count(program, "Equal", "Where") == [0, 2], "only the mask's Where reads another number"
    check(program, Shared(), inputs(kept(6), 6), "shared")


def test_half_precision() -> None:
    x, mask = inputs(float_masks(5)["causal -10000"], 5)
    program = export(Layers(), (x.half(), mask.half()), 24)
    assert count(program, "Attention", "Equal", "Where") == [2, 1, 1]
    lowest = torch.finfo(torch.float16).min
    mask = torch.zeros(B, 1, 6, 6).masked_fill(~kept(6), lowest).half()
    for given in (mask, torch.full_like(mask, lowest)):
        x, _ = inputs(given, 6)
        (actual,) = onnxruntime_outputs(program, (x.half(), given))
        torch.testing.assert_close(actual, Layers()(x.half(), given), rtol=5e-3, atol=5e-3)


class Bounded(Filled):
    """Two masks of the lowest number, whose sum is kept from becoming -inf; `how` says by what."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, given: Tensor) -> Any:
        q, k, v = x.split([H, G, G], 1)
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        lowest = torch.finfo(x.dtype).min
        triangle = torch.full((x.shape[2], x.shape[2]), lowest, dtype=x.dtype).triu(1)
        scores = q @ k.mT * 0.3 + torch.where(given, 0.0, lowest).to(x.dtype) + triangle
        if self.how == "maximum":
            scores = torch.maximum(scores, torch.tensor(lowest, dtype=x.dtype))
        elif self.how == "clamp":
            scores = scores.clamp(min=lowest)
        return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("how", ["maximum", "clamp", "not at all"])
def test_sums_of_the_lowest_number(how: str, dtype: torch.dtype) -> None:
    """Bounded, such a row averages over all keys, and else over those that one mask alone hides."""
    model = Bounded(how)
    x, given = inputs(left_padded(5), 5)
    program = export(model, (x.to(dtype), given), 24)
    assert count(program, "Attention") == [1]
    x, given = inputs(left_padded(7), 7)
    given[0] = False
    (actual,) = onnxruntime_outputs(program, (x.to(dtype), given))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(actual, model(x.to(dtype), given), rtol=tolerance, atol=tolerance)


def test_booleans_are_left_alone() -> None:
    class Boolean(Layers):
        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            q, k, v = x.split([H, G, G], 1)
            return nn.functional.scaled_dot_product_attention(q, k, v, given, enable_gqa=True)

    program = export(Boolean(), inputs(kept(5), 5), 24)
    assert count(program, "Attention", "Equal", "Where") == [1, 0, 0]
    check(program, Boolean(), inputs(kept(5), 5), "0 in PyTorch as well")


CASES = [
    (opset, kind, causal)
    for opset, kind, causal in itertools.product((23, 24), ("plain", "past", "lengths"), (0, 1))
    if not (opset == 23 and kind == "lengths")
]


@pytest.mark.parametrize(("opset", "kind", "is_causal"), CASES, ids=str)
def test_beside_causality_pasts_and_lengths(opset: int, kind: str, is_causal: int) -> None:
    """The model's nodes hide keys, too: what is left of a row can be the lowest number alone."""
    S, P, T = 3, 2 * (kind == "past"), 4
    random = np.random.default_rng(0)
    shapes = {"q": (B, H, S, D), "k": (B, H, T, D), "v": (B, H, T, D), "mask": (S, P + T)}
    if kind == "past":
        shapes |= {"past_key": (B, H, P, D), "past_value": (B, H, P, D)}
    feeds: dict[str, Any] = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    feeds["mask"][0, :2] = feeds["mask"][1] = LOWEST
    feeds["mask"][2, :2] = -np.inf
    feeds["mask"][2, 2] = LOWEST
    if kind == "lengths":
        feeds["lengths"] = np.array([2, 3])
    values = [ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(_kind(a))) for n, a in feeds.items()]
    read = [*values[:4], None, None, values[4]] if kind == "lengths" else values
    node = ir.node("Attention", read, {"is_causal": is_causal}, num_outputs=3 if kind == "past" else 1)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, node.outputs[:1], nodes=[node], opset_imports={"": opset})
    model = ir.Model(graph, ir_version=10)
    assert without_lowest(model) == 1
    assert [n.op_type for n in model.graph] == ["Equal", "Where", "Attention"]
    assert without_lowest(model) == 0 and len(model.graph) == 3, "once is enough"

    ort = require_onnxruntime()
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, feeds)
    q, k, v, mask = (torch.from_numpy(feeds[name]) for name in ("q", "k", "v", "mask"))
    offset = torch.tensor(P)
    seen = torch.ones(B, 1, S, P + T, dtype=torch.bool)
    if kind == "past":
        k, v = (torch.cat((torch.from_numpy(feeds[f"past_{n}"]), x), 2) for n, x in (("key", k), ("value", v)))
    if kind == "lengths":
        lengths = torch.from_numpy(feeds["lengths"]).view(-1, 1, 1, 1)
        seen, offset = torch.arange(T) < lengths, lengths - S
    if is_causal:
        seen = seen & (torch.arange(P + T) <= torch.arange(S).unsqueeze(1) + offset)
    scores = (q @ k.mT / D**0.5 + mask).masked_fill(~seen, -INF)
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-5, atol=1e-6)


def _kind(array: np.ndarray) -> ir.DataType:
    return ir.DataType.FLOAT if array.dtype == np.float32 else ir.DataType.INT64
