"""A session over a model of transformers in eager PyTorch, with the methods of `Session`: something to compare with."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fxfuse.errors import FxfuseError
from fxfuse.runtime.positions import Positions, check_chunk, checked, last
from fxfuse.versions import cache_name


class EagerSession:
    """A `PreTrainedModel` that generates text, with the cache that it makes itself.

    The methods are those of `fxfuse.runtime.Session`.

    Raises:
        FxfuseError: `model` is no language model of transformers.
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "get_output_embeddings"):
            raise FxfuseError(
                f"{type(model).__name__} is no language model of transformers",
                where="model",
                hint="fxfuse.integrations.torchtune.Eager(model) gives a decoder of TorchTune that interface",
            )
        self.model = model
        # Some models count positions by themselves, along attention_mask, and take none.
        self._positioned = "position_ids" in inspect.signature(getattr(model, "forward", model)).parameters
        self._cache_name = cache_name(model)
        self.reset()

    @property
    def reads_mask(self) -> bool:
        """True: rows may be padded on either side."""
        return True

    @property
    def length(self) -> int:
        """P: how many columns of the cache are written."""
        return self._positions.length

    def reset(self) -> None:
        """Forgets all that was read, and the cache."""
        self._positions = Positions()
        self._cache: Any = None

    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, chunk: int | None = None
    ) -> torch.Tensor:
        """The logits [B, V] after each row's last token; see `Session.prefill`."""
        ids, mask = checked(input_ids, attention_mask)
        check_chunk(chunk)
        final = last(mask)
        width = chunk or ids.shape[1]
        parts = [slice(start, start + width) for start in range(0, ids.shape[1], width)]
        logits = [self._run(ids[:, part], mask[:, part]) for part in parts]
        return torch.cat(logits, 1)[torch.arange(len(ids)), final]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] after one token a row, int64 [B]."""
        if self.length == 0:
            raise FxfuseError("there is nothing to go on from", where="step", hint="prefill(input_ids) first")
        return self._run(*checked(tokens[:, None], None))[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i of the cache becomes what row ``rows[i]`` was."""
        index = torch.from_numpy(self._positions.reorder(rows))
        self._cache.reorder_cache(index.to(self.model.device))

    @torch.no_grad()
    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attention_mask, position_ids = map(torch.from_numpy, self._positions.append(mask.numpy()))
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=attention_mask.to(device),
            **({"position_ids": position_ids.to(device)} if self._positioned else {}),
            **{self._cache_name: self._cache},
            use_cache=True,
        )
        self._cache = getattr(output, self._cache_name)
        logits: torch.Tensor = output.logits.cpu()
        return logits
