"""Writes a folder that generates text, whole or not at all:

model.onnx        one graph that prefills and decodes, or
prefill.onnx, decode.onnx          the two apart
weights.data      the weights of both
fxfuse.json       the manifest, see `fxfuse.package.manifest`
genai_config.json                  if it is for onnxruntime-genai; sliding windows count tokens then
tokenizer files, config.json, generation_config.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from fxfuse.decoder.masks.token_windows import with_token_windows
from fxfuse.errors import FxfuseError
from fxfuse.files import move_into, staging
from fxfuse.package.genai import CONFIG, write_genai_config
from fxfuse.package.manifest import MANIFEST, Manifest, manifest_of
from fxfuse.package.weights import share_weights
from fxfuse.pretrained.files import copy_tokenizer

Package = Literal["fxfuse", "genai"]
MODEL, PREFILL, DECODE, WEIGHTS = "model.onnx", "prefill.onnx", "decode.onnx", "weights.data"


def write_package(
    out: Path,
    prefill: ir.Model,
    *,
    decode: ir.Model | None = None,
    package: Package = "fxfuse",
    model: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> Manifest:
    """Writes the folder `out`. On failure, at whatever step, it holds what it held before.

    Everything is written into a hidden folder beside `out` first, checked there, and then moved. Graphs, weights,
    manifest and GenAI's configuration of an older package go; other files in `out` stay.

    Args:
        out: the folder; it is made if it is not there.
        prefill: a graph with its cache as inputs and outputs, named as `fxfuse.decoder.names` says, for any number of
            tokens after any past.
        decode: a graph of the same model for one token a row; without it `prefill` does both.
        package: "genai" adds what onnxruntime-genai goes by, and makes sliding windows count tokens.
        model: fields of `fxfuse.package.manifest.Model` that the graph does not say; `facts` reads them off a config.
        tokenizer: a folder with the tokenizer's files, which are copied.
        check: is given the hidden folder when all is in it, and raises if it is not right.

    Returns:
        The manifest that was written.

    Raises:
        FxfuseError: the graphs are no decoder with its cache, onnxruntime-genai cannot run them, or the folder cannot
            be written. Whatever `check` raises.
    """
    if package not in get_args(Package):
        raise FxfuseError(f"unknown package={package!r}", where="package", hint=" or ".join(get_args(Package)))
    if out.exists() and not out.is_dir():
        raise FxfuseError("the output folder is a file", where=str(out))
    if package == "genai":
        # It pads a batch on the right, and goes on after the padding.
        prefill, decode = with_token_windows(prefill), None if decode is None else with_token_windows(decode)
    with staging(out.absolute().parent, out.name) as folder:
        file = MODEL if decode is None else PREFILL
        manifest = manifest_of(prefill, file, decode=None if decode is None else (decode, DECODE), **(model or {}))
        try:
            ir.save(prefill, folder / file, external_data=WEIGHTS)
            if decode is not None:
                with share_weights(decode, folder / file):
                    ir.save(decode, folder / DECODE)
            manifest.write(folder)
            if package == "genai":
                write_genai_config(manifest, folder)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, folder)
            if check is not None:
                check(folder)
            move_into(folder, out, model=MANIFEST, stale=(CONFIG, MODEL, PREFILL, DECODE, WEIGHTS))
        except OSError as error:
            raise FxfuseError(f"writing failed: {error.strerror or error}", where=str(out)) from error
    return manifest


def facts(config: Any, **more: Any) -> dict[str, Any]:
    """Fields of `fxfuse.package.manifest.Model`, read off a model's configuration of transformers.

    Args:
        more: fields to set, or to set otherwise.
    """
    text = config.get_text_config()

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(text, name, None)) is not None), None)

    eos = first("eos_token_id")
    read = {
        "context_length": first("max_position_embeddings", "n_positions"),
        "hidden_size": first("hidden_size", "n_embd"),
        "heads": first("num_attention_heads", "n_head"),
        "pad": first("pad_token_id"),
        "bos": first("bos_token_id"),
        "eos": eos if isinstance(eos, list) else [] if eos is None else [eos],
    }
    return {**read, **more}


def with_dtype(manifest: Manifest, dtype: str) -> Manifest:
    """The manifest of the same folder, but with a cache of this dtype."""
    return dataclasses.replace(manifest, cache=dataclasses.replace(manifest.cache, dtype=dtype))
