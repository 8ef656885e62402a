"""What a folder holds that generates text: which graph prefills and which decodes, and the cache between them.

``fxfuse.json`` beside the graphs, by ``manifest.schema.json`` in this package:

    {"format": "fxfuse.pipeline", "version": 1,
     "cache":  {"form": "growing", "max_length": null, "dtype": "float32",
                "layers": [{"heads": 2, "head_dim": 16}, …]},
     "stages": {"prefill": {"file": "model.onnx", "inputs": […], "outputs": […]},
                "decode":  {"file": "model.onnx", "inputs": […], "outputs": […], "tokens": 1}},
     "links":  [{"output": "present.0.key", "input": "past_key_values.0.key", "shared": false}, …],
     "model":  {"vocab_size": 384, "context_length": 512, "hidden_size": 64, "heads": 4,
                "pad": 0, "bos": null, "eos": [1]}}

Prefill reads any number of tokens after any past; decode may be made for one token a row.
A link says that an output of one call is an input of the next; where it is shared, both are one buffer, [B, H, T, D],
of which a call writes the columns P to P + S. Otherwise the output is [B, H, P + S, D] for an input of [B, H, P, D].
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from fxfuse.errors import FxfuseError
from fxfuse.versions import CACHE_NAMES

MANIFEST = "fxfuse.json"
FORMAT, VERSION = "fxfuse.pipeline", 1
CACHE_METADATA = "fxfuse.state"
Form = Literal["growing", "static", "sliding", "streaming"]
PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_PAST_OF_TRANSFORMERS = re.compile(rf"input\.(?:{'|'.join(CACHE_NAMES)})\.layers\.(\d+)\.(key|value)s")
_OF_CACHE = re.compile(rf"past_key_values|^input\.(?:{'|'.join(CACHE_NAMES)})\.")


@dataclass(frozen=True)
class Layer:
    """One layer's keys, and its values: [B, heads, length, head_dim] each."""

    heads: int
    head_dim: int
    slots: int | None = None
    """The length, where this layer's buffers have one that is fixed: a ring of a window's size."""
    value_dim: int | None = None
    """The last dimension of the values, where it is another than that of the keys."""


@dataclass(frozen=True)
class Cache:
    """The geometry of the cache."""

    form: Form
    layers: Sequence[Layer]
    dtype: str = "float32"
    max_length: int | None = None
    """T, where the graph is made for one; otherwise whoever runs a static one chooses."""

    @property
    def open(self) -> bool:
        """Is it left to whoever runs it how long its buffers are?"""
        return self.form != "growing" and self.max_length is None and any(layer.slots is None for layer in self.layers)


@dataclass(frozen=True)
class Stage:
    """A graph, with the names of its inputs and outputs in their order."""

    file: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    tokens: int | None = None
    """How many a row a call takes, where the graph is made for a number of them."""


@dataclass(frozen=True)
class Link:
    """An output that is an input of the next call."""

    output: str
    input: str
    shared: bool


@dataclass(frozen=True)
class Model:
    """What the graphs do not say."""

    vocab_size: int
    context_length: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    pad: int | None = None
    bos: int | None = None
    eos: Sequence[int] = ()


@dataclass(frozen=True)
class Manifest:
    """The whole of it. One graph may be both stages."""

    prefill: Stage
    decode: Stage
    cache: Cache
    links: Sequence[Link]
    model: Model

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys([self.prefill.file, self.decode.file]))

    def to_json(self) -> dict[str, Any]:
        """What `fxfuse.json` holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "cache": asdict(self.cache),
            "stages": {"prefill": asdict(self.prefill), "decode": asdict(self.decode)},
            "links": [asdict(link) for link in self.links],
        }

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def manifest_of(prefill: ir.Model, file: str, *, decode: tuple[ir.Model, str] | None = None, **model: Any) -> Manifest:
    """The manifest of one graph, or of that and a `decode` graph for one token, read off their inputs and outputs.

    Args:
        file: the first graph's name in the folder.
        decode: the second graph and its name.
        model: fields of `Model`; ``vocab_size`` is read off the logits.

    Raises:
        FxfuseError: a graph is no decoder with its cache, or the two are not of one cache.
    """
    cache, links = _cache(prefill, file)
    logits = _named(prefill.graph.outputs, "logits", file)
    size = logits.shape[-1] if logits.shape else None
    if not isinstance(size, int):
        raise FxfuseError("the logits' last dimension is not a number", where=file)
    second, second_file = decode or (prefill, file)
    if _cache(second, second_file) != (cache, links):
        raise FxfuseError(f"its cache is not that of {file}", where=second_file)
    return Manifest(_stage(prefill, file), _stage(second, second_file), cache, links, Model(vocab_size=size, **model))


def read_manifest(path: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """The folder and the manifest at `path`: a folder that has one, or a graph alone, from which it is made.

    Raises:
        FxfuseError: neither, or not what the schema says.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".onnx":
        try:
            graph = ir.load(path)
        except Exception as error:  # whatever protobuf and onnx_ir raise
            raise FxfuseError(f"cannot be read as ONNX: {error}", where=str(path)) from error
        return path.parent, manifest_of(graph, path.name)
    file = path / MANIFEST if path.is_dir() else path
    if not file.is_file():
        raise FxfuseError(
            f"no {MANIFEST} there", where=str(path), hint="`fxfuse export MODEL --out DIR` writes one for a decoder"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise FxfuseError(f"{data['format']} {data['version']}, not {FORMAT} {VERSION}", where=str(file))
        manifest = _parsed(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FxfuseError(f"not a pipeline's manifest: {type(error).__name__}: {error}", where=str(file)) from error
    for name in manifest.files:
        if not (file.parent / name).is_file():
            raise FxfuseError(f"{name} is missing", where=str(file.parent))
    return file.parent, manifest


def place_of(name: str) -> tuple[int, str, str] | None:
    """For the name of an input that is a cache: its layer, "key" or "value", and the output that is it afterwards."""
    if match := PAST.fullmatch(name):
        return int(match[1]), match[2], f"present.{match[1]}.{match[2]}"
    if match := _PAST_OF_TRANSFORMERS.fullmatch(name):
        return int(match[1]), match[2], "output" + name.removeprefix("input")
    return None


def _parsed(data: Mapping[str, Any]) -> Manifest:
    cache = dict(data["cache"])
    if cache["form"] not in get_args(Form):
        raise ValueError(f"the cache is {cache['form']!r}")
    cache["layers"] = [Layer(**layer) for layer in cache["layers"]]
    prefill, decode = (Stage(**data["stages"][name]) for name in ("prefill", "decode"))
    return Manifest(prefill, decode, Cache(**cache), [Link(**link) for link in data["links"]], Model(**data["model"]))


def _cache(program: ir.Model, file: str) -> tuple[Cache, list[Link]]:
    outputs = {value.name: value for value in program.graph.outputs}
    said = json.loads(program.metadata_props.get(CACHE_METADATA, "{}"))
    sizes: dict[int, dict[str, tuple[int, int]]] = {}
    slots: dict[int, int | None] = {}
    links, forms, dtypes, lengths = [], set(), set(), set()
    rings = said.get("form") in ("sliding", "streaming")
    for value in program.graph.inputs:
        place = place_of(value.name or "")
        if place is None and _OF_CACHE.search(value.name or ""):
            raise FxfuseError(
                f"the cache holds {value.name}, which is neither keys nor values",
                where=file,
                hint='names="optimum" has keys and values only',
            )
        if place is None:
            continue
        index, what, present = place
        if present not in outputs or value.shape is None or len(value.shape) != 4:
            raise FxfuseError(f"{value.name} is not [B, H, P, D] with an output {present}", where=file)
        _, heads, length, head_dim = value.shape
        if not isinstance(heads, int) or not isinstance(head_dim, int) or value.dtype is None:
            raise FxfuseError(f"the heads of {value.name} are not numbers: {value.shape}", where=file)
        after = outputs[present].shape
        form: Form = said.get("form") or ("static" if after is not None and after[2] == length else "growing")
        if form not in get_args(Form):
            raise FxfuseError(
                f"the cache is {form!r}, which is not run yet", where=file, hint=" or ".join(get_args(Form))
            )
        sizes.setdefault(index, {})[what] = (heads, head_dim)
        slots[index] = length if rings and isinstance(length, int) else None
        links.append(Link(present, value.name or "", form != "growing"))
        forms.add(form)
        dtypes.add(value.dtype.name)
        lengths.add(length if isinstance(length, int) and not rings else None)
    layers = [_layer(sizes[i], slots[i]) for i in sorted(sizes)]
    whole = None not in layers and sorted(sizes) == list(range(len(sizes)))
    if len(forms) != 1 or len(dtypes) != 1 or len(lengths) != 1 or not whole:
        raise FxfuseError("not a decoder with one cache of keys and values in every layer", where=file)
    dtype = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}.get(dtypes.pop())
    if dtype is None:
        raise FxfuseError("the cache is neither float32, float16 nor bfloat16", where=file)
    length = lengths.pop() or said.get("max_length")
    return Cache(forms.pop(), [layer for layer in layers if layer is not None], dtype, length), links


def _layer(sizes: Mapping[str, tuple[int, int]], slots: int | None) -> Layer | None:
    """From heads and their size, of the keys and of the values; None where one is missing or their heads differ."""
    key, value = sizes.get("key"), sizes.get("value")
    if key is None or value is None or key[0] != value[0]:
        return None
    return Layer(*key, slots, None if key[1] == value[1] else value[1])


def _stage(program: ir.Model, file: str) -> Stage:
    shape = _named(program.graph.inputs, "input_ids", file).shape
    tokens = shape[1] if shape is not None and len(shape) == 2 else None
    inputs, outputs = ([v.name or "" for v in values] for values in (program.graph.inputs, program.graph.outputs))
    return Stage(file, inputs, outputs, tokens if isinstance(tokens, int) else None)


def _named(values: Sequence[ir.Value], name: str, file: str) -> ir.Value:
    for value in values:
        if value.name == name:
            return value
    raise FxfuseError(f"the graph has no {name}", where=file)
