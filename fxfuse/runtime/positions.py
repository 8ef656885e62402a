"""Which columns of the cache hold a token of which row, and at what position: the same for every runtime."""

from __future__ import annotations

import torch

from fxfuse.errors import FxfuseError


class Positions:
    """Counts along with what a cache is fed. Rows of unequal length are padded, on either side, and keep the holes.

    Attributes:
        mask: int64 [B, P], 1 where the cache holds a token and 0 where it holds padding.
    """

    def __init__(self) -> None:
        self.mask = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def length(self) -> int:
        """P: how many columns of the cache are written."""
        return self.mask.shape[1]

    def append(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What to feed for new columns with the mask [B, S]: the attention mask [B, P + S] and the positions [B, S].

        Raises:
            FxfuseError: another number of rows than before.
        """
        if self.length == 0:
            self.mask = mask[:, :0]
        if mask.shape[0] != self.mask.shape[0]:
            raise FxfuseError(
                f"{mask.shape[0]} rows after {self.mask.shape[0]}", where="input_ids", hint="reset() begins anew"
            )
        before = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, mask], -1)
        return self.mask, (before + mask.cumsum(-1) - 1).clamp(min=0)

    def of_rows(self, mask: torch.Tensor) -> torch.Tensor:
        """The positions [B, S] of new columns for a graph without attention_mask, before `append`: each row goes on
        where its own tokens end, over its padding.

        Raises:
            FxfuseError: padding on the left, which such a graph would see.
        """
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise FxfuseError("a row is padded on the left", where="attention_mask", hint="pad on the right")
        before = self.mask.sum(-1, keepdim=True) if self.length else torch.zeros(len(mask), 1, dtype=torch.int64)
        return before + torch.arange(mask.shape[1])

    def reorder(self, rows: torch.Tensor) -> None:
        self.mask = self.mask[rows]


def checked(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 [B, S].

    Raises:
        FxfuseError: shapes that do not fit, or a row of padding alone.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise FxfuseError(f"the token ids are {list(input_ids.shape)}, not [B, S]", where="input_ids")
    ids = input_ids.to("cpu", torch.int64)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to("cpu", torch.int64)
    if mask.shape != ids.shape:
        raise FxfuseError(
            f"the mask is {list(mask.shape)} and the token ids are {list(ids.shape)}",
            where="attention_mask",
            hint="it says which of the new tokens are no padding; of the older ones the session knows",
        )
    if not bool(mask.any(-1).all()):
        raise FxfuseError("a row without a token", where="attention_mask")
    return ids, mask


def last(mask: torch.Tensor) -> torch.Tensor:
    """The column of each row's last token, int64 [B], of a mask [B, S]."""
    columns = torch.arange(mask.shape[1])
    return (mask * (columns + 1)).argmax(-1)
