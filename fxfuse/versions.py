"""What differs between the releases of the libraries that fxfuse works with, each with its reason.

Asked of the library itself (a signature, a field, a class), not of its number: a release in between, or a fork, answers
for itself.
"""

from __future__ import annotations

import inspect
from typing import Any

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
