"""Which columns of the cache hold a token of which row, and at what position: the same for every runtime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fxfuse.errors import FxfuseError

Array = npt.NDArray[np.int64]


class Positions:
    """Counts along with what a cache is fed. Rows of unequal length are padded, on either side, and keep the holes.

    In numpy, where an operation on a few numbers takes a tenth of the time that it takes in torch: it is done once a
    token.
    """

    def __init__(self) -> None:
        self.length = 0
        """P: how many columns of the cache are written."""
        self._written = np.zeros((0, 0), np.int64)
        """The mask, [B, P], and room behind it."""
        self._tokens = np.zeros((0, 1), np.int64)
        """How many of a row's columns are tokens."""

    @property
    def batch(self) -> int:
        """B, once something was read."""
        return len(self._written)

    def append(self, new: Array) -> tuple[Array, Array]:
        """What to feed for new columns with the mask [B, S]: the attention mask [B, P + S] and the positions [B, S].

        Raises:
            FxfuseError: another number of rows than before.
        """
        rows, columns = new.shape
        if self.length == 0:
            self._written, self._tokens = np.zeros((rows, columns), np.int64), np.zeros((rows, 1), np.int64)
        _check_batch(rows, self.batch)
        total = self.length + columns
        if total > self._written.shape[1]:
            self._written = np.concatenate([self._written[:, : self.length], np.zeros((rows, total), np.int64)], 1)
        self._written[:, self.length : total] = new
        self.length = total
        tokens = self._tokens + new.cumsum(1)
        self._tokens = tokens[:, -1:]
        # A copy: later columns must not show in what was handed out.
        return self._written[:, :total].copy(), np.maximum(tokens - 1, 0)

    def reorder(self, rows: torch.Tensor) -> Array:
        """Row i becomes what row ``rows[i]`` was; the rows as int64 [B].

        Raises:
            FxfuseError: there are no such rows.
        """
        index = _checked_rows(rows, self.batch)
        self._written, self._tokens = self._written[index], self._tokens[index]
        return index


class RowLengths:
    """The same for graphs without attention_mask: each row goes on where its own tokens end, over its padding.

    Of each row only its length is kept, however much was read.
    """

    def __init__(self) -> None:
        self.length = 0
        """P: how many columns were read."""
        self._tokens = np.zeros((0, 1), np.int64)

    @property
    def batch(self) -> int:
        """B, once something was read."""
        return len(self._tokens)

    def append(self, new: Array) -> tuple[None, Array]:
        """The positions [B, S] of new columns with the mask [B, S].

        Raises:
            FxfuseError: another number of rows than before; padding on the left, which such a graph would see.
        """
        if (new[:, 1:] > new[:, :-1]).any():
            raise FxfuseError("a row is padded on the left", where="attention_mask", hint="pad on the right")
        if self.length == 0:
            self._tokens = np.zeros((len(new), 1), np.int64)
        _check_batch(len(new), self.batch)
        positions = self._tokens + np.arange(new.shape[1])
        self._tokens = self._tokens + new.sum(1, keepdims=True)
        self.length += new.shape[1]
        return None, positions

    def reorder(self, rows: torch.Tensor) -> Array:
        """As of `Positions`."""
        index = _checked_rows(rows, self.batch)
        self._tokens = self._tokens[index]
        return index


def _check_batch(new: int, before: int) -> None:
    if new != before:
        raise FxfuseError(f"{new} rows after {before}", where="input_ids", hint="reset() begins anew")


def _checked_rows(rows: torch.Tensor, batch: int) -> Array:
    index: Array = rows.to("cpu", torch.int64).numpy()
    if index.ndim != 1 or len(index) == 0 or not ((index >= 0) & (index < batch)).all():
        raise FxfuseError(f"{rows.tolist()} are not rows of {batch}", where="rows")
    return index


def checked(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as int64 [B, S].

    Raises:
        FxfuseError: shapes that do not fit, or a row of padding alone.
    """
    ids = checked_ids(input_ids)
    if attention_mask is None:
        return ids, torch.ones_like(ids)
    mask = attention_mask.to("cpu", torch.int64)
    if mask.shape != ids.shape:
        raise FxfuseError(
            f"the mask is {list(mask.shape)} and the token ids are {list(ids.shape)}",
            where="attention_mask",
            hint="it says which of the new tokens are no padding; of the older ones the session knows",
        )
    if not bool(mask.any(-1).all()):
        raise FxfuseError("a row without a token", where="attention_mask")
    return ids, mask


def checked_ids(input_ids: torch.Tensor) -> torch.Tensor:
    """As int64 [B, S].

    Raises:
        FxfuseError: another shape.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise FxfuseError(f"the token ids are {list(input_ids.shape)}, not [B, S]", where="input_ids")
    return input_ids.to("cpu", torch.int64)


def check_chunk(chunk: int | None) -> None:
    """Raises FxfuseError unless it is a number of columns, or None."""
    if chunk is not None and chunk < 1:
        raise FxfuseError(f"chunk={chunk}", where="chunk", hint="a number of columns, 1 or more")


def last(mask: torch.Tensor) -> torch.Tensor:
    """The column of each row's last token, int64 [B], of a mask [B, S]."""
    columns = torch.arange(mask.shape[1])
    return (mask * (columns + 1)).argmax(-1)
