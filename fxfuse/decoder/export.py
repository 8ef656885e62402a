"""Exports a causal language model as one graph that prefills and decodes, named as an ecosystem expects it.

    input_ids      [B, S]           logits          [B, S, vocabulary]
    attention_mask [B, P + S]       present, key    [B, H, P + S, D]     of every layer, and value
    position_ids   [B, S]
    past, key      [B, H, P, D]     of every layer, and value; P is 0 in the first call

Capture gives a graph whose cache grows; everything else is made of that (`fxfuse.decoder.forms`). What the tensors of
the cache are called is said in `fxfuse.decoder.names`, and what the graph says of its cache in
`fxfuse.decoder.description`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from fxfuse.decoder.description import describe
from fxfuse.decoder.forms.ragged import make_ragged
from fxfuse.decoder.forms.ring import make_rings
from fxfuse.decoder.forms.static import Profile, make_static
from fxfuse.decoder.forms.streaming import make_streaming
from fxfuse.decoder.masks.padding import simplify_padding
from fxfuse.decoder.names import Names, is_of_cache, renamed
from fxfuse.decoder.options import SINKS, Cache, check_decoder_options
from fxfuse.decoder.scaled_query import scale_queries
from fxfuse.errors import FxfuseError
from fxfuse.integrations import torchtune
from fxfuse.options import BUDGET, DEFAULT_OPSET, check_accept, check_budget, check_strict
from fxfuse.quiet import quiet
from fxfuse.versions import CACHE_NAMES

_ONE_TOKEN = ("dimension inputs['input_ids'].shape[1]", "dimension inputs['position_ids'].shape[1]")
"""Dimensions of which torch warns that a sample of size 1 fixes them; a graph for one token asks for just that."""
_WINDOW = "._sliding_window_tensor"
_AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
}
_CACHE_AXES = ("batch_size", None, "past_sequence_length", None)


def export_decoder(
    model: Any,
    *,
    opset: int = DEFAULT_OPSET,
    names: Names = "optimum",
    cache: Cache = "auto",
    profile: Profile = "cpu",
    ragged: bool = False,
    one_token: bool = False,
    sinks: int | None = None,
    window: int | None = None,
    accept: Sequence[str] = (),
    budget: float = BUDGET,
    strict: bool = False,
) -> ir.Model:
    """The graph of a decoder, with its cache as inputs and outputs; its inputs and outputs are listed above.

    A copy of the model is captured, and its weights are shared.

    Args:
        model: a `PreTrainedModel` that generates text from text, or a `torchtune.modules.TransformerDecoder`, whose own
            caches play no part if they were set up.
        opset: of the ONNX graph, 23 to 25.
        names: what the tensors of the cache are called: "optimum", "genai" or "hf" (`fxfuse.decoder.names`).
        cache: "growing" gives back a longer cache than it took; "static" writes into buffers of any length T, which
            input and output may share (`fxfuse.decoder.forms.static`); "sliding" is static, and layers with a window
            have rings of its size (`fxfuse.decoder.forms.ring`); "streaming" reads without end and keeps the first
            tokens and the last (`fxfuse.decoder.forms.streaming`), which is not what the model computes, but lets it go
            on; "auto" is growing.
        profile: "cpu" writes what ONNX Runtime's CPU kernels run fastest: queries scaled before the attention
            (`fxfuse.decoder.scaled_query`) and slices of a static cache; "cuda" reads its buffers whole.
        ragged: of a static cache, whether each row has a length of its own (`fxfuse.decoder.forms.ragged`); the graph
            has no attention_mask then.
        one_token: whether the graph is for one new token a row alone (S = 1), which needs no causal mask. It has the
            same cache as the graph for any number of tokens, and the two may take turns on it.
        sinks: of a streaming cache, how many of the first tokens are kept; None: 4.
        window: of a streaming cache, how many of the last tokens are kept.
        accept: refusals to overrule by name; see `fxfuse.fuse`.
        budget: seconds after which the search for more to fuse ends; see `fxfuse.fuse`.
        strict: whether to leave what differs on the smallest rows; see `fxfuse.fuse`.

    Raises:
        FxfuseError: the model is no such decoder; its cache holds something else than one key and one value a layer
            (with `names` other than "hf"); the graph does not allow the cache that is asked for; an option has a value
            that is not known, or options do not go together (a static cache needs opset 24, for example).
    """
    check_decoder_options(
        opset=opset,
        cache=cache,
        names=names,
        profile=profile,
        ragged=ragged,
        one_token=one_token,
        sinks=sinks,
        window=window,
    )
    check_accept(accept)
    check_budget(budget)
    check_strict(strict)
    windows = windows_of(model) if cache == "sliding" else {}
    export = _of_torchtune if torchtune.is_decoder(model) else _of_transformers
    program = export(model, opset, names, one_token, {"accept": tuple(accept), "budget": budget, "strict": strict})
    _name_axes(program)
    simplify_padding(program)
    if ragged:
        make_ragged(program)
    elif cache == "static":
        make_static(program, profile)
    elif cache == "sliding":
        make_rings(program, windows)
    elif cache == "streaming":
        assert window is not None
        make_streaming(program, SINKS if sinks is None else sinks, window)
    elif names != "hf":
        describe(program, "growing")
    if profile == "cpu":
        scale_queries(program)
    return program


def export_step(model: Any, *, names: Names = "genai", **options: Any) -> ir.Model:
    """The graph of `export_decoder` for one new token a row: S is 1, and no causal mask is left in it.

    Raises:
        FxfuseError: what `export_decoder` refuses.
    """
    return export_decoder(model, names=names, one_token=True, **options)


def windows_of(model: Any) -> dict[int, int]:
    """By layer with a sliding window, how many positions a query sees, its own included.

    Raises:
        FxfuseError: no layer has one.
    """
    if torchtune.is_decoder(model):
        windows = torchtune.windows(model)
    else:
        text = model.config.get_text_config()
        size = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        windows = {i: size for i, kind in enumerate(kinds) if kind == "sliding_attention" and size}
    if not windows:
        raise FxfuseError("no layer of the model has a sliding window", where="cache", hint='cache="static"')
    return windows


def _of_torchtune(model: Any, opset: int, names: Names, one_token: bool, fusing: dict[str, Any]) -> ir.Model:
    if names == "hf":
        raise FxfuseError("a model of torchtune has no names of transformers", where="names", hint='names="optimum"')
    return torchtune.export_growing(model, opset=opset, one_token=one_token, **fusing)


def _of_transformers(model: Any, opset: int, names: Names, one_token: bool, fusing: dict[str, Any]) -> ir.Model:
    from fxfuse.integrations.transformers import FxfuseConfig, FxfuseExporter

    config = FxfuseConfig(dynamic=True, opset_version=opset, **fusing)
    stage, inputs = _decode_stage(model, one_token)
    with quiet(*_ONE_TOKEN if one_token else ()):
        program: ir.Model = FxfuseExporter().export(stage, inputs, config).program
    if not any(is_of_cache(value.name) for value in program.graph.outputs):
        raise FxfuseError(
            "the model gives no cache back, and so reads all tokens in every call",
            where=type(model).__name__,
            hint="a decoder of its family has is_decoder in its configuration",
        )
    if names != "hf":
        _drop_windows(program.graph)
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = renamed(value.name or "", names)
    return program


def _decode_stage(model: Any, one_token: bool) -> tuple[Any, dict[str, Any]]:
    """What `generate` of transformers calls to read more than one new token after a past, and the inputs of that call.
    Captured with a past, the graph takes an empty one as well."""
    from transformers.exporters.utils import decompose_for_generation

    # Padding at the left, or `generate` would find the mask superfluous and leave it out.
    ids = torch.ones((2, 5), dtype=torch.int64, device=model.device)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=model.device)
    try:
        stages = decompose_for_generation(
            model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=not one_token
        )
    except Exception as error:  # whatever a model raises that takes something else than text
        raise FxfuseError(
            f"the model does not generate text from text: {error}",
            where=type(model).__name__,
            hint="fxfuse.integrations.transformers exports other models, stage by stage",
        ) from error
    stage, inputs = stages["decode"]
    # Some models count positions by themselves, along attention_mask.
    missing = {"input_ids", "attention_mask"} - set(inputs)
    cache = next((inputs[name] for name in CACHE_NAMES if name in inputs), None)
    if not any(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in getattr(cache, "layers", ())):
        missing.add("a cache of keys and values")  # Mamba's holds states of its own
    if set(stages) != {"prefill", "decode"} or missing:
        raise FxfuseError(
            f"not a decoder alone: it generates in the stages {', '.join(stages)} from {', '.join(inputs)}"
            + "".join(f", without {name}" for name in sorted(missing)),
            where=type(model).__name__,
            hint="fxfuse.integrations.transformers exports other models, stage by stage",
        )
    return stage, dict(inputs)


def _drop_windows(graph: ir.Graph) -> None:
    """Takes the size of a sliding window out of the inputs and outputs: transformers passes that number through the
    graph as a part of the cache."""
    for output in [value for value in graph.outputs if (value.name or "").endswith(_WINDOW)]:
        node = output.producer()
        graph.outputs.remove(output)
        if node is not None and not output.uses():
            graph.remove(node, safe=True)
    for value in [value for value in graph.inputs if (value.name or "").endswith(_WINDOW)]:
        if not value.uses():
            graph.inputs.remove(value)


def _name_axes(program: ir.Model) -> None:
    """Names the dimensions of all values: "batch_size" and the like where torch has symbols (s27), and numbers where
    torch writes a size that it found fixed as a text."""
    known: dict[str, str] = {}
    for value in program.graph.inputs:
        names = _AXES.get(value.name or "", _CACHE_AXES if value.shape and len(value.shape) == 4 else ())
        for dim, name in zip(value.shape or (), names, strict=False):
            if isinstance(dim, ir.SymbolicDim) and name is not None:
                known.setdefault(str(dim.value), name)
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, known)) + r")\b")
    outputs = (output for node in program.graph.all_nodes() for output in node.outputs)
    for value in (*program.graph.inputs, *outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else _named(dim, symbols, known) for dim in value.shape]
            )


def _named(dim: ir.SymbolicDim, symbols: re.Pattern[str], known: dict[str, str]) -> int | str | None:
    if dim.value is None or dim.value.isdecimal():
        return dim.value and int(dim.value)
    text = symbols.sub(lambda match: known[match[0]], dim.value)
    # Symbols are numbered anew in every export, and so torch puts the terms of a sum in one order or another.
    return text if "(" in text else " + ".join(sorted(text.split(" + ")))
