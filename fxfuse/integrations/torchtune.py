"""A decoder of torchtune as one graph that prefills and decodes; `fxfuse.decoder.export` says with which inputs.

torchtune's own caches are buffers of one batch size that count the calls, and its decoders take no mask for padded
tokens. So a copy of the model is captured, which shares the weights. In it every attention is given a stand-in for its
cache, which joins the new keys to an input of the graph, and the mask [B, S, P + S] is computed from `attention_mask`
and the order of the keys.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fxfuse.errors import FxfuseError
from fxfuse.onnx.exporter import export
from fxfuse.options import BUDGET, DEFAULT_OPSET

BATCH, NEW, PAST = "batch_size", "sequence_length", "past_sequence_length"


def is_decoder(model: object) -> bool:
    """Is it a `torchtune.modules.TransformerDecoder`? This does not import torchtune."""
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    return "torchtune.TransformerDecoder" in names


def export_growing(
    model: nn.Module,
    *,
    opset: int = DEFAULT_OPSET,
    one_token: bool = False,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
) -> ir.Model:
    """The graph of a `TransformerDecoder` whose cache grows. `model` is not changed; its caches, if any, are not used.

    Args:
        accept: refusals to overrule by name; see `fxfuse.fuse`.
        budget: seconds after which the search for more to fuse ends; see `fxfuse.fuse`.
        strict: is nothing fused that differs on the smallest rows? See `fxfuse.fuse`.

    Raises:
        FxfuseError: a model with other layers than self-attention, in training mode, or that cannot be captured.
    """
    stage = Stage(model)
    layers = range(len(stage.attentions))
    pasts = [f"past_key_values.{i}.{what}" for i in layers for what in ("key", "value")]
    batch, past, total = (torch.export.Dim(n) for n in (BATCH, PAST, "total_sequence_length"))
    new = torch.export.Dim(NEW, max=getattr(model, "max_seq_len", None))  # the model raises if there are more
    ids = {0: batch} if one_token else {0: batch, 1: new}
    axes = [ids, {0: batch, 1: total}, ids, tuple({0: batch, 2: past} for _ in pasts)]
    program = export(
        stage.eval(),
        stage.sample(1 if one_token else 3),
        dynamic_shapes=axes,
        opset_version=opset,
        accept=accept,
        budget=budget,
        strict=strict,
        input_names=["input_ids", "attention_mask", "position_ids", *pasts],
        output_names=["logits", *(name.replace("past_key_values", "present") for name in pasts)],
    )
    return program.model


class Stage(nn.Module):
    """`model` with the signature that a runtime calls: a step gets all it needs as inputs, and returns what the next
    step needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.attentions = _attentions(self.model)
        self.shapes: list[torch.Size] = []
        if getattr(self.model, "num_output_chunks", 0):
            self.model.set_num_output_chunks(0)  # type: ignore[operator]
        for attention in self.attentions:
            attention.kv_cache = None
            attention.setup_cache(1, next(model.parameters()).dtype, 1)
            self.shapes.append(attention.kv_cache.k_cache.shape)
            del attention.kv_cache  # PyTorch lets a module's attribute be replaced only by another module
            attention.kv_cache = _Grown()
            attention.cache_enabled = True
            if (window := getattr(attention, "sliding_window_size", None)) is not None:
                # It counts from the first of the new tokens, as if there were no past.
                attention.sliding_window_size = None
                attention.register_forward_pre_hook(_Window(window), with_kwargs=True)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        for i, attention in enumerate(self.attentions):
            attention.kv_cache.past = past[2 * i], past[2 * i + 1]
        P, S = past[0].shape[2], input_ids.shape[1]
        key = torch.arange(P + S, device=input_ids.device)
        query = torch.arange(S, device=input_ids.device) + P
        # Read by index: as a slice, the length of attention_mask would have to be known to be P + S.
        kept = attention_mask.bool().index_select(1, key)
        mask = (key <= query.unsqueeze(1)) & kept.unsqueeze(1)
        logits = self.model(input_ids, mask=mask, input_pos=position_ids)
        return logits, *(tensor for attention in self.attentions for tensor in attention.kv_cache.present)

    def sample(self, length: int) -> tuple[Any, ...]:
        """Sample inputs for the capture: two rows of `length` tokens, after a past of five."""
        weight = next(self.model.parameters())
        ids = torch.ones(2, length, dtype=torch.int64, device=weight.device)
        positions = torch.arange(5, 5 + length, device=weight.device).expand(2, length).contiguous()
        past = tuple(
            torch.zeros(2, heads, 5, size, dtype=weight.dtype, device=weight.device)
            for _, heads, _, size in self.shapes
            for _ in ("key", "value")
        )
        return ids, torch.ones(2, 5 + length, dtype=torch.int64, device=weight.device), positions, past


class Eager:
    """A decoder of torchtune that can be called as transformers' models are: in eager PyTorch, with a growing cache."""

    def __init__(self, model: nn.Module) -> None:
        self.stage = Stage(model).eval()
        self.weight = next(model.parameters())

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def get_output_embeddings(self) -> nn.Module:
        return self.stage.model.output  # type: ignore[return-value]

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, **_: Any
    ) -> SimpleNamespace:
        """Returns `logits` [B, S, V] and `past_key_values`; None for the past means that there is none."""
        if past_key_values is None:
            empty = ((len(input_ids), heads, 0, size) for _, heads, _, size in self.stage.shapes for _ in range(2))
            past_key_values = [torch.zeros(shape, dtype=self.weight.dtype, device=self.device) for shape in empty]
        logits, *present = self.stage(input_ids, attention_mask, position_ids, past_key_values)
        return SimpleNamespace(logits=logits, past_key_values=_Pasts(present))


class _Pasts(list[Tensor]):
    """Keys and values [B, H, P, D] of all layers; `reorder_cache` as transformers' caches have it."""

    def reorder_cache(self, rows: Tensor) -> None:
        self[:] = [tensor.index_select(0, rows) for tensor in self]


class _Grown:
    """Stands in for `torchtune.modules.KVCache`, of which an attention only calls `update`."""

    past: tuple[Tensor, Tensor]
    present: tuple[Tensor, Tensor]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values [B, H, P + S, D]."""
        self.present = torch.cat([self.past[0], k], 2), torch.cat([self.past[1], v], 2)
        return self.present


class _Window:
    """A hook that hides, in the mask [B, S, P + S], keys that lie `size` or more positions back."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask: Tensor = kwargs["mask"]
        S, T = mask.shape[-2:]
        query = torch.arange(S, device=mask.device) + (T - S)
        near = torch.arange(T, device=mask.device) > query.unsqueeze(1) - self.size
        return args, {**kwargs, "mask": mask & near}


def windows(model: nn.Module) -> dict[int, int]:
    """For each layer with a window, how many positions a query sees, its own included."""
    sizes = (getattr(attention, "sliding_window_size", None) for attention in _attentions(model))
    return {layer: size for layer, size in enumerate(sizes) if size is not None}


def _attentions(model: Any) -> list[Any]:
    """The self-attention of every layer."""
    found = []
    for place, layer in enumerate(model.layers):
        attentions = [m for m in layer.modules() if hasattr(m, "kv_cache") and hasattr(m, "setup_cache")]
        if len(attentions) != 1 or "Cross" in type(layer).__name__:
            raise FxfuseError(
                f"{type(layer).__name__} is no layer of one self-attention",
                where=f"{type(model).__name__}.layers.{place}",
                hint="only decoders that read nothing but text have a graph of this kind",
            )
        found.append(attentions[0])
    return found
