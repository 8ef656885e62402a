"""What differs between the releases of the libraries that fxfuse works with, and what is private to them, each with
its reason. Of torch that is in `fxfuse.torch_seams`.

Asked of the library itself (a signature, a field, a class), not of its number: a release in between, or a fork, answers
for itself.
"""

from __future__ import annotations

import inspect
from typing import Any

from fxfuse.torch_seams.declared import Seam

CACHE_NAMES = ("cache", "past_key_values")
"""What the models of transformers call the cache that they are given and give back, the newest name first.

transformers 5.24 renamed it, with the old name deprecated until 5.40. The name is also part of the inputs' and outputs'
names in what its exporters write: ``input.cache.layers.0.keys``, before that ``input.past_key_values.layers.0.keys``.
"""


def cache_name(model: Any) -> str:
    """What `model` calls its cache, as an argument of `forward` and as a field of what that returns.

    A model whose `forward` names neither takes what its library calls it by, if anything, among its ``**kwargs``.
    """
    forward = getattr(model, "forward", model)
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


TRANSFORMERS_EXPORTER = "transformers.exporters.exporter_dynamo"
"""The module whose messages `fxfuse.quiet` leaves out."""
TUNE_DOCUMENTS, TUNE_CALL = "_get_document_ids_from_seq_lens", "_attention_call"
"""TorchTune: document ids of packed samples, and what an attention calls, which it holds as an attribute."""
PRIVATE = (
    Seam(f"{TRANSFORMERS_EXPORTER}.logger", "tells of arguments that fxfuse passes"),
    Seam("transformers.masking_utils.fast_all", "is a guard on data in a capture of flex_attention"),
    Seam(
        "transformers.utils.logging",
        "says and draws what fxfuse tells as an error",
        (
            "disable_progress_bar",
            "enable_progress_bar",
            "get_verbosity",
            "is_progress_bar_enabled",
            "set_verbosity",
            "set_verbosity_error",
        ),
    ),
    Seam(
        "torchtune.modules.attention_utils",
        "masks of packed samples, made as lists wherever there is a GPU",
        ("packed_block_causal_mask", TUNE_DOCUMENTS),
    ),
    Seam("torchtune.modules.attention.MultiHeadAttention", "calls a compiled flex_attention, which no capture takes"),
)
"""`fxfuse.torch_seams.moved` looks these up too, if it is given them."""
