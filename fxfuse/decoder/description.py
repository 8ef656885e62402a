"""What the cache of a graph is: one description, which every form of cache writes and everything that runs one reads.

A graph carries it in `metadata_props["fxfuse.state"]`, as JSON:

    {"form": "static", "max_length": null, "layers": [{"heads": 2, "head_dim": 8}, …],
     "aliases": {"present.0.key": "past_key_values.0.key", …}}

and a package's manifest (`fxfuse.package.manifest`) has the part that whoever allocates the cache needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import onnx_ir as ir

from fxfuse.decoder.names import Place, is_of_cache, pasts_of, place_of
from fxfuse.errors import FxfuseError

METADATA = "fxfuse.state"
"""The key of `metadata_props` that holds the description."""
Form = Literal["growing", "static", "sliding", "streaming"]
_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class Layer:
    """One layer's keys, and its values: [B, heads, length, head_dim] each."""

    heads: int
    head_dim: int
    slots: int | None = None
    """The length of this layer's buffers, where the graph fixes it: W of a ring, sinks + W of a streaming cache."""
    value_dim: int | None = None
    """The last dimension of the values, where it is another than that of the keys."""

    def size(self, what: Literal["key", "value"]) -> int:
        """The last dimension of the keys or of the values."""
        return self.value_dim if what == "value" and self.value_dim is not None else self.head_dim


@dataclass(frozen=True)
class CacheDescription:
    """What the cache of a graph is, and which outputs may lie in the memory of which inputs."""

    form: Form | Literal["state"]
    """How a call changes the cache; "state" is anything that a model writes in place (`fxfuse.onnx.state_names`)."""
    layers: Sequence[Layer]
    dtype: str | None = None
    """Of keys and values: float32, float16 or bfloat16. None after `from_metadata`, for metadata does not hold it."""
    max_length: int | None = None
    """The length of all buffers, where the graph fixes it; of a static cache whoever runs the graph chooses it."""
    sinks: int | None = None
    """How many of the first tokens a streaming cache keeps."""
    window: int | None = None
    """How many of the last tokens a streaming cache keeps."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """By output, the input whose memory it may share; of a growing cache none may."""

    @property
    def takes_length(self) -> bool:
        """Does whoever runs the graph choose how long its buffers are, or some of them?"""
        return self.form != "growing" and self.max_length is None and any(layer.slots is None for layer in self.layers)

    # ---- in a graph

    def to_metadata(self) -> str:
        """The JSON of `metadata_props["fxfuse.state"]`."""
        layers: list[dict[str, Any]] = [{"heads": layer.heads, "head_dim": layer.head_dim} for layer in self.layers]
        if self.form == "sliding":
            for record, layer in zip(layers, self.layers, strict=True):
                record["window"] = layer.slots
        streams = {"sinks": self.sinks, "window": self.window} if self.form == "streaming" else {}
        about = {"form": self.form, "max_length": self.max_length, **streams, "layers": layers}
        return json.dumps({**about, "aliases": dict(self.aliases)})

    @classmethod
    def from_metadata(cls, text: str, *, where: str) -> CacheDescription:
        """What `to_metadata` wrote.

        Args:
            where: the file that it was read from, for the message.

        Raises:
            FxfuseError: it is no such JSON, or of a form that this version does not know.
        """
        try:
            data = json.loads(text)
            form = data["form"]
            if form not in (*get_args(Form), "state"):
                raise FxfuseError(
                    f"the cache is {form!r}, which is not run yet", where=where, hint=" or ".join(get_args(Form))
                )
            length = data.get("max_length")
            fixed = length if form == "streaming" else None
            layers = [Layer(one["heads"], one["head_dim"], one.get("window", fixed)) for one in data.get("layers", ())]
            sinks, window = data.get("sinks"), data.get("window")
            return cls(form, layers, None, length, sinks, window, dict(data.get("aliases") or {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FxfuseError(
                f"its metadata does not describe a cache: {type(error).__name__}: {error}",
                where=f'{where}: metadata_props["{METADATA}"]',
                hint="export the model again",
            ) from error

    def write(self, model: ir.Model) -> None:
        """Puts the description into the model's metadata."""
        model.metadata_props[METADATA] = self.to_metadata()

    # ---- in a manifest

    def to_manifest(self) -> dict[str, Any]:
        """The part of `fxfuse.json` called "cache"."""
        layers = [asdict(layer) for layer in self.layers]
        return {"form": self.form, "layers": layers, "dtype": self.dtype, "max_length": self.max_length}

    @classmethod
    def from_manifest(cls, data: Mapping[str, Any], aliases: Mapping[str, str]) -> CacheDescription:
        """What `to_manifest` wrote, which its schema has been held against; the manifest's links say the aliases."""
        layers = [Layer(**layer) for layer in data["layers"]]
        return cls(data["form"], layers, data["dtype"], data["max_length"], aliases=aliases)


def describe(
    model: ir.Model,
    form: Form,
    *,
    rings: Mapping[int, int] | None = None,
    sinks: int | None = None,
    window: int | None = None,
) -> None:
    """Writes into the metadata of `model`, whose cache is of this form now, what its inputs say of the cache.

    Args:
        rings: of a sliding cache, the number of slots of each layer that is a ring.
        sinks: of a streaming cache.
        window: of a streaming cache.

    Raises:
        FxfuseError: heads or their size are not numbers, so that nobody could allocate the cache.
    """
    pasts = pasts_of(model)
    length = None if sinks is None or window is None else sinks + window
    layers = {
        place.layer: Layer(*_heads(value, "cache"), (rings or {}).get(place.layer, length))
        for place, value in pasts
        if place.what == "key"
    }
    aliases = {} if form == "growing" else {place.present: value.name or "" for place, value in pasts}
    layers_in_order = [layers[layer] for layer in sorted(layers)]
    CacheDescription(form, layers_in_order, None, length, sinks, window, aliases).write(model)


def cache_of(model: ir.Model, file: str) -> CacheDescription:
    """The cache of a decoder's graph: what its metadata says, and its inputs and outputs besides.

    A graph without metadata has a growing cache, or a static one if keys come out as long as they went in.

    Args:
        file: the graph's name, for messages.

    Raises:
        FxfuseError: the graph is no decoder with keys and values of one dtype and one form in every layer.
    """
    text = model.metadata_props.get(METADATA)
    said = None if text is None else CacheDescription.from_metadata(text, where=file)
    pasts: list[tuple[Place, ir.Value]] = []
    for value in model.graph.inputs:
        place = place_of(value.name)
        if place is None and is_of_cache(value.name):
            raise FxfuseError(
                f"the cache holds {value.name}, which is neither keys nor values",
                where=file,
                hint='names="optimum" has keys and values only',
            )
        if place is not None:
            pasts.append((place, value))
    forms = {_form(model.graph, place, value, said, file) for place, value in pasts}
    fixed = {_length(value) for _, value in pasts}
    dtypes = {value.dtype for _, value in pasts}
    rings = bool(forms & {"sliding", "streaming"})
    layers = _layers(pasts, rings, file)
    if len(forms) != 1 or len(dtypes) != 1 or (len(fixed) != 1 and not rings) or layers is None:
        raise FxfuseError(
            "not a decoder with one cache of keys and values in every layer",
            where=file,
            hint="fxfuse.onnx.decoder.export_decoder and `fxfuse export` write such graphs",
        )
    (form,), (dtype,) = forms, dtypes
    if dtype not in _DTYPES:
        raise FxfuseError(
            "the cache is neither float32, float16 nor bfloat16", where=file, hint="export the model in one of these"
        )
    length = (None if rings else fixed.pop()) or (said.max_length if said is not None else None)
    aliases = {} if form == "growing" else {place.present: value.name or "" for place, value in pasts}
    sinks, window = (None, None) if said is None else (said.sinks, said.window)
    return CacheDescription(form, layers, _DTYPES[dtype], length, sinks, window, aliases)


def _form(graph: ir.Graph, place: Place, past: ir.Value, said: CacheDescription | None, file: str) -> Form:
    """The form of the cache that this input is of."""
    present = next((value for value in graph.outputs if value.name == place.present), None)
    if present is None or past.shape is None or len(past.shape) != 4:
        raise FxfuseError(f"{past.name} is not [B, H, P, D] with an output {place.present}", where=file)
    if said is None:
        return "static" if present.shape is not None and present.shape[2] == past.shape[2] else "growing"
    if said.form == "state":
        raise FxfuseError("the cache is 'state', which is not run yet", where=file, hint=" or ".join(get_args(Form)))
    return said.form


def _layers(pasts: Sequence[tuple[Place, ir.Value]], rings: bool, file: str) -> list[Layer] | None:
    """The layers in their order; None where one is missing, or has keys without values, or of other heads."""
    found = {(place.layer, place.what): value for place, value in pasts}
    layers = []
    for index in range(len(found) // 2):
        key, value = found.get((index, "key")), found.get((index, "value"))
        if key is None or value is None:
            return None
        (heads, size), (value_heads, value_size) = _heads(key, file), _heads(value, file)
        if heads != value_heads:
            return None
        layers.append(Layer(heads, size, _length(key) if rings else None, None if size == value_size else value_size))
    return layers if layers and 2 * len(layers) == len(found) else None


def _heads(value: ir.Value, where: str) -> tuple[int, int]:
    """The number of heads of keys or values, and their size."""
    heads, size = (None, None) if value.shape is None else (value.shape[1], value.shape[3])
    if not isinstance(heads, int) or not isinstance(size, int):
        raise FxfuseError(f"the heads of {value.name} are not numbers: {value.shape}", where=where)
    return heads, size


def _length(value: ir.Value) -> int | None:
    """How many slots the buffers have, where that is a number."""
    length = None if value.shape is None else value.shape[2]
    return length if isinstance(length, int) else None
