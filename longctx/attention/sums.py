"""Accumulators that are not filled with zeros first: what comes to a row first is put there.

Memory that is written once more than needed costs as much as a good part of the attention of short documents.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from longctx.attention.steps import Blocks, Rows


class Seen:
    """Which rows of some accumulators hold anything; the others are undefined memory."""

    def __init__(self, rows: int) -> None:
        self._seen_N = np.zeros(rows, dtype=bool)
        self._left = rows

    def first(self, rows: Rows | Blocks, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether none of ``rows`` holds anything yet; all will. Where only some do, the others become zeros."""
        if not self._left:
            return False
        before = self._seen_N[rows.host]
        count = int(before.sum())
        if count == len(before):
            return False
        if count:
            unseen_N = np.zeros_like(self._seen_N)
            unseen_N[rows.host] = ~before
            _clear(tensors, unseen_N)
        self._seen_N[rows.host] = True
        self._left -= len(before) - count
        return not count

    def clear_rest(self, tensors: Sequence[torch.Tensor]) -> None:
        """Zeros for all rows that hold nothing."""
        if self._left:
            _clear(tensors, ~self._seen_N)
            self._left = 0


def _clear(tensors: Sequence[torch.Tensor], where_N: npt.NDArray[np.bool_]) -> None:
    """Zeros, run by run."""
    edges = np.flatnonzero(np.diff(where_N, prepend=False, append=False))
    for start, stop in edges.reshape(-1, 2).tolist():
        for tensor in tensors:
            tensor[start:stop].zero_()


class Sums:
    """Sums of what steps add to some rows. A row holds nothing until something is added: that is put there, not added.

    ``total`` [rows, ...] is the memory of the sums, ``parts`` views of it that are added to together.
    """

    def __init__(self, total: torch.Tensor, *parts: torch.Tensor) -> None:
        self._total, self._parts = total, parts or (total,)
        self._seen = Seen(total.shape[0])

    @staticmethod
    def like(tensor: torch.Tensor, dtype: torch.dtype) -> "Sums":
        """For rows of the same shape."""
        return Sums(torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format))

    @staticmethod
    def pair(tensor: torch.Tensor, dtype: torch.dtype) -> "Sums":
        """For two such tensors, stacked [rows, 2, ...] and added to together."""
        total = torch.empty(tensor.shape[0], 2, *tensor.shape[1:], dtype=dtype, device=tensor.device)
        return Sums(total, *total.unbind(1))

    def add(self, rows: Rows | Blocks, *addends: torch.Tensor) -> None:
        """Add to each part."""
        first = self._seen.first(rows, self._parts)
        for part, addend in zip(self._parts, addends, strict=True):
            rows.assign_(part, addend) if first else rows.add_(part, addend)

    def finished(self) -> torch.Tensor:
        """The sums: zero where nothing was added. Nothing is added after that."""
        self._seen.clear_rest(self._parts)
        return self._total
