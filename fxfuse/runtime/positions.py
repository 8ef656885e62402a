"""Counts along with what a session reads: which columns of the cache hold tokens of which row, at what positions, and
so what the next call is to be given as attention_mask and position_ids."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fxfuse.errors import FxfuseError

Array = npt.NDArray[np.int64]


class Positions:
    """For graphs with an attention_mask. Rows of unequal length are padded on either side, and the padding stays in the
    cache, hidden by the mask.

    It is done in numpy, once a token: there an operation on a few numbers takes a tenth of the time that torch needs.
    """

    def __init__(self) -> None:
        self.length = 0
        """P: how many columns of the cache are written."""
        self._written = np.zeros((0, 0), np.int64)
        """The mask [B, P], 1 for tokens and 0 for padding, with room for more columns behind it."""
        self._tokens = np.zeros((0, 1), np.int64)
        """How many of each row's columns are tokens, [B, 1]."""

    @property
    def batch(self) -> int:
        """B, once something was read."""
        return len(self._written)

    def append(self, new: Array) -> tuple[Array, Array]:
        """Adds new columns, and says what the call that reads them is to be given.

        Args:
            new: int64 [B, S], 1 for tokens and 0 for padding.

        Returns:
            attention_mask [B, P + S] and position_ids [B, S], both int64.

        Raises:
            FxfuseError: there are more or fewer rows than before.
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
        """Row i becomes what row ``rows[i]`` was; returns `rows` as a numpy array, int64 [B].

        Raises:
            FxfuseError: there are no such rows.
        """
        index = _checked_rows(rows, self.batch)
        self._written, self._tokens = self._written[index], self._tokens[index]
        return index


class RowLengths:
    """The same for graphs without an attention_mask: each row goes on where its own tokens end, over its padding.

    However much was read, only the length of each row is kept.
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
        """As `Positions.append`, with None for the attention mask.

        Raises:
            FxfuseError: there are more or fewer rows than before, or a row is padded on the left, where such a graph
                would take the padding for tokens.
        """
        if (new[:, 1:] > new[:, :-1]).any():
            raise FxfuseError(
                "a row is padded on the left, and the graph has no attention_mask that would hide that",
                where="attention_mask",
                hint="pad on the right",
            )
        if self.length == 0:
            self._tokens = np.zeros((len(new), 1), np.int64)
        _check_batch(len(new), self.batch)
        positions = self._tokens + np.arange(new.shape[1])
        self._tokens = self._tokens + new.sum(1, keepdims=True)
        self.length += new.shape[1]
        return None, positions

    def reorder(self, rows: torch.Tensor) -> Array:
        """As `Positions.reorder`."""
        index = _checked_rows(rows, self.batch)
        self._tokens = self._tokens[index]
        return index


def _check_batch(new: int, before: int) -> None:
    if new != before:
        raise FxfuseError(
            f"{new} rows after {before}: the cache holds as many rows as were read first",
            where="input_ids",
            hint="reset() begins anew, and reorder(rows) repeats or drops rows",
        )


def _checked_rows(rows: torch.Tensor, batch: int) -> Array:
    index: Array = rows.to("cpu", torch.int64).numpy()
    if index.ndim != 1 or len(index) == 0 or not ((index >= 0) & (index < batch)).all():
        raise FxfuseError(
            f"{rows.tolist()} are not rows of {batch}", where="rows", hint=f"numbers from 0 to {batch - 1}, one or more"
        )
    return index


def checked(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask as int64 [B, S] on the CPU; without a mask all are tokens.

    Raises:
        FxfuseError: the shapes do not fit, or a row is all padding.
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
        raise FxfuseError(
            "a row without a token: all of it is padding", where="attention_mask", hint="leave the row out"
        )
    return ids, mask


def checked_ids(input_ids: torch.Tensor) -> torch.Tensor:
    """Token ids as int64 [B, S] on the CPU.

    Raises:
        FxfuseError: they are not of two dimensions, or there are none.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise FxfuseError(f"the token ids are {list(input_ids.shape)}, not [B, S]", where="input_ids")
    return input_ids.to("cpu", torch.int64)


def check_chunk(chunk: int | None) -> None:
    """Raises FxfuseError unless it is a number of columns, or None."""
    if chunk is not None and chunk < 1:
        raise FxfuseError(f"chunk={chunk} is no number of columns", where="chunk", hint="1 or more")


def last(mask: torch.Tensor) -> torch.Tensor:
    """The column of each row's last token, int64 [B], from a mask [B, S]."""
    columns = torch.arange(mask.shape[1])
    return (mask * (columns + 1)).argmax(-1)
