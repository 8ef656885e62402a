"""Loading a checkpoint whole: every weight of the class comes from it, and every weight in it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fxfuse.errors import FxfuseError
from fxfuse.pretrained.holds import Holds
from fxfuse.pretrained.quiet import quiet

SHOWN = 6
"""At most this many names of weights are listed in a message; for the others their number is given."""


def load(holds: Holds, dtype: torch.dtype, *, allow_missing: bool = False, local: bool = True) -> tuple[Any, list[str]]:
    """Load the model in evaluation mode; the list holds notes on its weights for the user.

    Tied weights (an output layer that is the embedding) need to be in the checkpoint only once.

    Args:
        dtype: of the weights.
        allow_missing: go on if weights do not fit; the notes then say what that means.
        local: look at files only, not on the Hub.

    Raises:
        FxfuseError: it does not load, or weights are missing, unused, of another shape, or too large for float16.
    """
    quantised = getattr(holds.config, "quantization_config", None)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # transformers draws missing weights at random
            model, info = holds.cls.from_pretrained(
                holds.source,
                config=holds.config if isinstance(holds.config, _config_class(holds)) else None,
                dtype=dtype,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with their names
                **({"trust_remote_code": True} if holds.trust_remote_code else {}),
            )
    except Exception as error:  # readers of checkpoints raise errors of many types
        said = str(error).strip() or type(error).__name__
        if quantised:
            raise FxfuseError(
                f"the weights are quantised ({_method(quantised)}), and transformers does not load them here: {said}",
                where=holds.source,
                hint="install what it names, or export the checkpoint that was quantised",
            ) from error
        raise FxfuseError(f"the model cannot be loaded: {said}", where=holds.source) from error
    if quantised and getattr(model, "hf_quantizer", None) is None:
        raise FxfuseError(
            f"the weights are quantised ({_method(quantised)}), which this transformers does not know, and would read "
            "as if they were not",
            where=holds.source,
            hint="export the checkpoint that was quantised",
        )
    notes = []
    for what, names, hint in _complaints(info):
        if not allow_missing:
            raise FxfuseError(f"{what}: {_some(names)}", where=holds.source, hint=f"{hint}; --allow-missing goes on")
        notes.append(f"{what}: {_some(names)}")
    check_finite(model, holds.source)
    return model.eval().requires_grad_(False), notes


def _complaints(info: dict[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    """What does not fit between checkpoint and class: for each kind a sentence, the weights, and what to do."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = [f"{name} ({list(has)}, not {list(own)})" for name, has, own in sorted(info["mismatched_keys"])]
    if missing:
        # If names differ, the same weight is missing under one and unused under the other, so the message shows both.
        beside = f"; it has {_some(unused, 2)}, which the class does not use" if unused else ""
        yield (
            f"{_count(missing)} not in the checkpoint{beside}. transformers draws at random",
            missing,
            "make architectures and tie_word_embeddings in config.json those of the weights",
        )
    if shapes:
        yield (
            f"{_count(shapes)} of another shape in the checkpoint. transformers draws at random",
            shapes,
            "make the sizes in config.json those of the weights",
        )
    if unused:
        adapters = any(mark in name for name in unused for mark in ("lora_", ".adapter", "ia3_"))
        yield (
            f"{_count(unused)} in the checkpoint that the class in config.json does not use",
            unused,
            "merge the adapters into the model before it is saved"
            if adapters
            else "make architectures in config.json the class that was saved",
        )


def check_finite(model: Any, where: str) -> None:
    """Refuse weights that float16 cannot hold.

    Raises:
        FxfuseError: a weight became infinite.
    """
    for name, weight in model.state_dict().items():
        if weight.dtype == torch.float16 and bool(weight.isinf().any()):
            raise FxfuseError(f"{name} does not fit into float16", where=where, hint="--dtype float32")


def _config_class(holds: Holds) -> Any:
    """Of a class whose configuration is a part of the folder's, transformers picks the part."""
    import transformers

    own = getattr(holds.cls, "config_class", None)
    if own is None or own not in holds.config.sub_configs.values():
        return transformers.PreTrainedConfig
    return own


def _method(quantised: Any) -> str:
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    return str(getattr(method, "value", method) or "by an unnamed method")


def _count(names: list[str]) -> str:
    return "1 weight is" if len(names) == 1 else f"{len(names)} weights are"


def _some(names: list[str], limit: int = SHOWN) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
