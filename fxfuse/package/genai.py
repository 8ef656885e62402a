"""``genai_config.json``, by which onnxruntime-genai loads the folder, derived from the manifest.

What onnxruntime-genai 0.18 does: it pads a batch on the right and keeps the mask of those columns 0 from then on; and a
buffer that past and present share, it makes as long as the ``max_length`` of its generator.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fxfuse.errors import FxfuseError
from fxfuse.package.manifest import Manifest, Stage

CONFIG = "genai_config.json"


def genai_config(manifest: Manifest) -> dict[str, Any]:
    """What ``genai_config.json`` holds for this folder.

    Raises:
        FxfuseError: the cache is of bfloat16, which does not run there; or the file has no words for the model: layers
            have different heads, values are of another size than keys, or it is not known how long a text may become or
            which token pads or ends it.
    """
    model, cache = manifest.model, manifest.cache
    check_form(cache.form)
    if cache.dtype == "bfloat16":
        raise FxfuseError(
            "bfloat16: the configuration names the CPU, where ONNX Runtime has no bfloat16 attention",
            where="--package genai",
            hint="export the model in float32 or float16",
        )
    if len(set(cache.layers)) != 1:
        raise FxfuseError(
            "layers of different heads: genai_config.json has one number for all",
            where="--package genai",
            hint="--package fxfuse, for fxfuse.runtime",
        )
    if cache.layers[0].value_dim is not None:
        raise FxfuseError(
            "heads of other sizes in the values than in the keys: genai_config.json has one number for both",
            where="--package genai",
            hint="--package fxfuse, for fxfuse.runtime",
        )
    context = cache.max_length or model.context_length
    if context is None:
        raise FxfuseError(
            "how long a text may become is not known",
            where="--package genai",
            hint="set max_position_embeddings in the model's config",
        )
    pad = model.pad if model.pad is not None else next(iter(model.eos), None)
    if pad is None:
        raise FxfuseError(
            "neither a padding nor an end-of-text token",
            where="--package genai",
            hint="set one in the model's config; for torchtune's, in a config.json beside the --checkpoint",
        )
    layer = cache.layers[0]
    decoder: dict[str, Any] = {
        # Products with quantised weights in float32, as the model has them; nothing where there are none.
        "session_options": {"provider_options": [], "session.qdq_matmulnbits_accuracy_level": "1"},
        "head_size": layer.head_dim,
        "hidden_size": model.hidden_size or layer.head_dim * (model.heads or layer.heads),
        "num_attention_heads": model.heads or layer.heads,
        "num_key_value_heads": layer.heads,
        "num_hidden_layers": len(cache.layers),
        "inputs": {
            **{
                name: name for name in ("input_ids", "attention_mask", "position_ids") if name in manifest.decode.inputs
            },
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    pair = manifest.prefill != manifest.decode
    if pair:
        decoder["pipeline"] = [
            {"prefill": _stage(manifest.prefill, prompt=True)},
            {"decode": _stage(manifest.decode, prompt=False)},
        ]
    else:
        decoder["filename"] = manifest.decode.file
    tokens: dict[str, Any] = {"pad_token_id": pad, "eos_token_id": list(model.eos) or [pad]}
    if model.bos is not None:
        tokens["bos_token_id"] = model.bos
    return {
        "model": {
            "type": "decoder-pipeline" if pair else "decoder",
            "vocab_size": model.vocab_size,
            "context_length": context,
            **tokens,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "past_present_share_buffer": cache.form == "static",
        },
    }


def check_form(form: str) -> None:
    """Raises FxfuseError for a form of cache that onnxruntime-genai has no buffers for."""
    if form in ("sliding", "streaming"):
        raise FxfuseError(
            f"onnxruntime-genai makes buffers as long as the text may become: a {form} cache has shorter ones",
            where="--package genai",
            hint="a growing or static cache; fxfuse.runtime runs this one, without --package genai",
        )


def write_genai_config(manifest: Manifest, folder: Path) -> None:
    """Writes the file into `folder`.

    Raises:
        FxfuseError: as `genai_config`.
        OSError: it cannot be written.
    """
    (folder / CONFIG).write_text(json.dumps(genai_config(manifest), indent=2) + "\n", encoding="utf-8")


def _stage(stage: Stage, *, prompt: bool) -> dict[str, Any]:
    return {
        "filename": stage.file,
        "inputs": list(stage.inputs),
        "outputs": list(stage.outputs),
        "run_on_prompt": prompt,
        "run_on_token_gen": not prompt,
    }
