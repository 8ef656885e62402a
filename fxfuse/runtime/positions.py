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
        _check_batch(len(mask), self.batch)
        before = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, mask], -1)
        return self.mask, (before + mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def batch(self) -> int:
        return len(self.mask)

    def reorder(self, rows: torch.Tensor) -> torch.Tensor:
        """Row i becomes what row ``rows[i]`` was; the rows as int64 [B].

        Raises:
            FxfuseError: there are no such rows.
        """
        index = rows.to("cpu", torch.int64)
        if index.ndim != 1 or len(index) == 0 or not bool(((index >= 0) & (index < len(self.mask))).all()):
            raise FxfuseError(f"{rows.tolist()} are not rows of {len(self.mask)}", where="rows")
        self.mask = self.mask[index]
        return index


class RowLengths:
    """The same for graphs without attention_mask: each row goes on where its own tokens end, over its padding.

    Of each row only its length is kept, however much was read.

    Attributes:
        length: P: how many columns were read.
    """

    def __init__(self) -> None:
        self.length = 0
        self.rows = torch.zeros(0, 1, dtype=torch.int64)

    @property
    def batch(self) -> int:
        return len(self.rows)

    def append(self, mask: torch.Tensor) -> tuple[None, torch.Tensor]:
        """The positions [B, S] of new columns with the mask [B, S].

        Raises:
            FxfuseError: another number of rows than before; padding on the left, which such a graph would see.
        """
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise FxfuseError("a row is padded on the left", where="attention_mask", hint="pad on the right")
        if self.length == 0:
            self.rows = torch.zeros(len(mask), 1, dtype=torch.int64)
        _check_batch(len(mask), self.batch)
        positions = self.rows + torch.arange(mask.shape[1])
        self.rows = self.rows + mask.sum(-1, keepdim=True)
        self.length += mask.shape[1]
        return None, positions

    def reorder(self, rows: torch.Tensor) -> None:
        self.rows = self.rows[rows]


def _check_batch(new: int, before: int) -> None:
    if new != before:
        raise FxfuseError(f"{new} rows after {before}", where="input_ids", hint="reset() begins anew")


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


def check_chunk(chunk: int | None) -> None:
    """Raises FxfuseError unless it is a number of columns, or None."""
    if chunk is not None and chunk < 1:
        raise FxfuseError(f"chunk={chunk}", where="chunk", hint="a number of columns, 1 or more")


def last(mask: torch.Tensor) -> torch.Tensor:
    """The column of each row's last token, int64 [B], of a mask [B, S]."""
    columns = torch.arange(mask.shape[1])
    return (mask * (columns + 1)).argmax(-1)
