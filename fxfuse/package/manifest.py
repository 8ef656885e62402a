"""The manifest of a folder that generates text: which graph prefills, which decodes, and what the cache between them
is.

It is the file ``fxfuse.json`` beside the graphs. Its schema is ``manifest.schema.json`` in this package:

    {"format": "fxfuse.pipeline", "version": 1,
     "cache":  {"form": "growing", "max_length": null, "dtype": "float32",
                "layers": [{"heads": 2, "head_dim": 16}, …]},
     "stages": {"prefill": {"file": "model.onnx", "inputs": […], "outputs": […]},
                "decode":  {"file": "model.onnx", "inputs": […], "outputs": […], "tokens": 1}},
     "links":  [{"output": "present.0.key", "input": "past_key_values.0.key", "shared": false}, …],
     "model":  {"vocab_size": 384, "context_length": 512, "hidden_size": 64, "heads": 4,
                "pad": 0, "bos": null, "eos": [1]}}

The prefill graph reads any number of tokens after any past; the decode graph may be made for one token a row. A link
says that an output of one call is an input of the next. Where it is shared, both are one buffer [B, H, T, D], of which
a call writes columns P to P + S; otherwise [B, H, P, D] goes in and [B, H, P + S, D] comes out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx_ir as ir

from fxfuse.decoder.description import CacheDescription, cache_of
from fxfuse.decoder.names import place_of
from fxfuse.errors import FxfuseError

MANIFEST = "fxfuse.json"
FORMAT, VERSION = "fxfuse.pipeline", 1
_SCHEMA = "manifest.schema.json"


@dataclass(frozen=True)
class Stage:
    """One of the two graphs, prefill or decode, with the names of its inputs and outputs in their order."""

    file: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    tokens: int | None = None
    """How many new tokens a row a call takes, where the graph is made for that number alone."""


@dataclass(frozen=True)
class Link:
    """An output of one call that is an input of the next."""

    output: str
    input: str
    shared: bool
    """Whether both are one buffer, which a call writes in place."""


@dataclass(frozen=True)
class Model:
    """What whoever generates text needs to know of the model, and its graphs do not say."""

    vocab_size: int
    context_length: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    """How many query heads a layer has; the cache has the number of key heads."""
    pad: int | None = None
    bos: int | None = None
    eos: Sequence[int] = ()


@dataclass(frozen=True)
class Manifest:
    """What `fxfuse.json` says. One graph may be both stages."""

    prefill: Stage
    decode: Stage
    cache: CacheDescription
    links: Sequence[Link]
    model: Model

    @property
    def files(self) -> list[str]:
        """The names of the graphs' files, each once."""
        return list(dict.fromkeys([self.prefill.file, self.decode.file]))

    def to_json(self) -> dict[str, Any]:
        """What `fxfuse.json` holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "cache": self.cache.to_manifest(),
            "stages": {"prefill": asdict(self.prefill), "decode": asdict(self.decode)},
            "links": [asdict(link) for link in self.links],
        }

    def write(self, folder: Path) -> None:
        """Writes `fxfuse.json` into `folder`."""
        (folder / MANIFEST).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")


def manifest_of(prefill: ir.Model, file: str, *, decode: tuple[ir.Model, str] | None = None, **model: Any) -> Manifest:
    """The manifest of one graph, or of that and a `decode` graph for one token, read off their inputs and outputs.

    Args:
        prefill: a graph for any number of tokens after any past.
        file: its name in the folder.
        decode: the second graph and its name.
        model: fields of `Model`; ``vocab_size`` is read off the logits.

    Raises:
        FxfuseError: a graph is no decoder with its cache, or the two graphs' caches differ, so that they could not take
            turns on one.
    """
    cache = cache_of(prefill, file)
    logits = _named(prefill.graph.outputs, "logits", file)
    size = logits.shape[-1] if logits.shape else None
    if not isinstance(size, int):
        raise FxfuseError("the logits' last dimension is not a number", where=file)
    second, second_file = decode or (prefill, file)
    if cache_of(second, second_file) != cache:
        raise FxfuseError(f"its cache is not that of {file}", where=second_file)
    places = [(value.name or "", place_of(value.name)) for value in prefill.graph.inputs]
    links = [Link(place.present, name, place.present in cache.aliases) for name, place in places if place is not None]
    return Manifest(_stage(prefill, file), _stage(second, second_file), cache, links, Model(vocab_size=size, **model))


def read_manifest(path: str | os.PathLike[str]) -> tuple[Path, Manifest]:
    """The folder and the manifest at `path`: a folder that has one, or a graph alone, from which it is made.

    The manifest is held against its schema first. Files that it names lie in its folder: a name that is absolute or
    leads out by ".." is refused, for a folder may come from anywhere. Links in the folder are followed: whoever put the
    folder on this disk made them (Hugging Face's cache keeps every file behind one).

    Raises:
        FxfuseError: there is neither; the manifest is not what its schema says (the message names the file, the place
            in it and what to do); a file that it names lies elsewhere or is missing; its parts do not fit together.
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
    manifest = _parsed(_checked(file))
    _check_links(manifest, file)
    for stage, name in (("prefill", manifest.prefill.file), ("decode", manifest.decode.file)):
        _check_inside(name, f"{file}: stages.{stage}.file")
        if not (file.parent / name).is_file():
            raise FxfuseError(
                f"{name} is missing",
                where=str(file.parent),
                hint=f"put it beside {MANIFEST}, or export the model again",
            )
    return file.parent, manifest


def _checked(file: Path) -> dict[str, Any]:
    """The JSON of a manifest, held against its schema.

    Raises:
        FxfuseError: it is of another version, or not what the schema says.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match
    except ImportError as error:
        raise FxfuseError("jsonschema is not installed", hint="pip install 'fxfuse[ort]'") from error
    again = f"export the model again, or mend it by fxfuse/package/{_SCHEMA}"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise FxfuseError(f"not a pipeline's manifest: {error}", where=str(file), hint=again) from error
    if isinstance(data, dict) and (made := (data.get("format"), data.get("version"))) != (FORMAT, VERSION):
        if made[0] == FORMAT:
            again = f"this fxfuse reads version {VERSION}: export the model again with it"
        raise FxfuseError(f"{made[0]} {made[1]}, not {FORMAT} {VERSION}", where=str(file), hint=again)
    schema = json.loads(Path(__file__).with_name(_SCHEMA).read_text(encoding="utf-8"))
    found = best_match(Draft202012Validator(schema).iter_errors(data))
    if found is not None:
        place = found.json_path.removeprefix("$").removeprefix(".")
        raise FxfuseError(
            f"not a pipeline's manifest: {found.message}", where=f"{file}: {place}" if place else str(file), hint=again
        )
    return dict(data)


def _parsed(data: Mapping[str, Any]) -> Manifest:
    prefill, decode = (Stage(**data["stages"][name]) for name in ("prefill", "decode"))
    links = [Link(**link) for link in data["links"]]
    aliases = {link.output: link.input for link in links if link.shared}
    cache = CacheDescription.from_manifest(data["cache"], aliases)
    return Manifest(prefill, decode, cache, links, Model(**data["model"]))


def _check_links(manifest: Manifest, file: Path) -> None:
    """Raises FxfuseError where a link is between no output and input of both graphs, or of no layer of the cache."""
    for number, link in enumerate(manifest.links):
        place, why = place_of(link.input), None
        if place is None or place.layer >= len(manifest.cache.layers):
            why = f"{link.input} is no input of a cache of {len(manifest.cache.layers)} layers"
        for stage in (manifest.prefill, manifest.decode):
            if link.input not in stage.inputs:
                why = f"{stage.file} has no input {link.input}"
            elif link.output not in stage.outputs:
                why = f"{stage.file} has no output {link.output}"
        if why is not None:
            raise FxfuseError(
                f"not a pipeline's manifest: {why}", where=f"{file}: links[{number}]", hint="export the model again"
            )


def _check_inside(name: str, where: str) -> None:
    """Raises FxfuseError where a file's name leads out of the manifest's folder, on whichever system it was written."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.anchor or ".." in path.parts:
            raise FxfuseError(
                f"not a pipeline's manifest: {name!r} leads out of its folder",
                where=where,
                hint=f"a manifest names files beside it; put the graph beside {MANIFEST} and name it alone",
            )


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
