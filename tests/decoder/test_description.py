"""What a graph says of its cache: the JSON in its metadata, and what is read off its inputs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fxfuse.decoder.description import METADATA, CacheDescription, Form, Layer, cache_of, describe
from fxfuse.decoder.names import place_of
from fxfuse.errors import FxfuseError
from tests.package.decoders import decoder

ALIASES = {
    f"present.{layer}.{what}": f"past_key_values.{layer}.{what}" for layer in (0, 1) for what in ("key", "value")
}
LAYER = {"heads": 2, "head_dim": 8}
WRITTEN: dict[Form, tuple[dict[str, Any], dict[str, Any]]] = {
    "growing": ({}, {"form": "growing", "max_length": None, "layers": [LAYER] * 2, "aliases": {}}),
    "static": ({}, {"form": "static", "max_length": None, "layers": [LAYER] * 2, "aliases": ALIASES}),
    "sliding": (
        {"rings": {1: 4}},
        {
            "form": "sliding",
            "max_length": None,
            "layers": [{**LAYER, "window": None}, {**LAYER, "window": 4}],
            "aliases": ALIASES,
        },
    ),
    "streaming": (
        {"sinks": 1, "window": 3},
        {
            "form": "streaming",
            "max_length": 4,
            "sinks": 1,
            "window": 3,
            "layers": [LAYER] * 2,
            "aliases": ALIASES,
        },
    ),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_every_form_is_written_as_it_always_was(form: Form) -> None:
    """Whoever reads the metadata without fxfuse goes by this JSON."""
    options, expected = WRITTEN[form]
    model = decoder()
    describe(model, form, **options)
    text = model.metadata_props[METADATA]
    assert text == json.dumps(expected)
    assert CacheDescription.from_metadata(text, where="model.onnx").to_metadata() == text


def test_what_a_model_writes_in_place_is_described_too() -> None:
    state = CacheDescription("state", (), aliases={"present.count": "count"})
    assert json.loads(state.to_metadata()) == {
        "form": "state",
        "max_length": None,
        "layers": [],
        "aliases": {"present.count": "count"},
    }
    model = decoder()
    state.write(model)
    with pytest.raises(FxfuseError, match="'state', which is not run yet"):
        cache_of(model, "model.onnx")


def test_a_graph_without_metadata_is_read_off_its_inputs() -> None:
    assert cache_of(decoder(), "a.onnx") == CacheDescription("growing", [Layer(2, 8)] * 2, "float32")
    static = cache_of(decoder("slots", value_size=4), "a.onnx")
    assert static == CacheDescription("static", [Layer(2, 8, None, 4)] * 2, "float32", aliases=ALIASES)
    assert static.takes_length and static.layers[0].size("value") == 4 and static.layers[0].size("key") == 8
    assert cache_of(decoder(32), "a.onnx").max_length == 32


def test_metadata_says_what_inputs_cannot() -> None:
    model = decoder(4)
    describe(model, "streaming", sinks=1, window=3)
    cache = cache_of(model, "a.onnx")
    assert (cache.form, cache.max_length, cache.sinks, cache.window) == ("streaming", 4, 1, 3)
    assert list(cache.layers) == [Layer(2, 8, 4)] * 2 and not cache.takes_length


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"form": "growing", "layers": [{}]}', '{"form": "growing", "layers": 3}']
)
def test_metadata_that_describes_no_cache_is_named(text: str) -> None:
    model = decoder()
    model.metadata_props[METADATA] = text
    with pytest.raises(FxfuseError, match="does not describe a cache") as error:
        cache_of(model, "a.onnx")
    assert (
        error.value.where == 'a.onnx: metadata_props["fxfuse.state"]' and error.value.hint == "export the model again"
    )


def test_a_form_that_is_not_known_is_named() -> None:
    model = decoder()
    model.metadata_props[METADATA] = '{"form": "liquid"}'
    with pytest.raises(FxfuseError, match="'liquid', which is not run yet"):
        cache_of(model, "a.onnx")


def test_heads_that_are_no_numbers_cannot_be_allocated() -> None:
    with pytest.raises(FxfuseError, match=r"heads of past_key_values\.0\.key are not numbers"):
        describe(decoder(heads="heads"), "growing")
    with pytest.raises(FxfuseError, match=r"heads of past_key_values\.0\.key are not numbers"):
        cache_of(decoder(heads="heads"), "a.onnx")


def test_a_layer_without_values_is_no_cache() -> None:
    model = decoder()
    model.graph.inputs.pop()
    with pytest.raises(FxfuseError, match="keys and values in every layer"):
        cache_of(model, "a.onnx")


def test_names() -> None:
    assert place_of("past_key_values.3.key") == (3, "key", "present.3.key")
    assert place_of("input_ids") is None and place_of("output.cache.layers.3.keys") is None
