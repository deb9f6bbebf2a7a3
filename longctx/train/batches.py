"""From rows to this rank's micro-batches. Legend: B rows of a micro-batch, T local tokens.

Which rows a step trains on depends on the step alone: rows [step * batch, (step + 1) * batch). Data rank r of R takes
the r-th R-th of them; each sequence rank reads only its own runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from longctx.model.head import IGNORED
from longctx.model.proposals import Targets
from longctx.runtime.mesh import Mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents, Run

Int64Array = npt.NDArray[np.int64]


class RowSource(Protocol):
    """Rows in training order; see :class:`longctx.data.rows.Rows`."""

    def documents(self, row: int) -> tuple[int, ...]: ...

    def read(self, row: int, runs: Sequence[Run]) -> tuple[Int64Array, Int64Array]: ...


TargetsOf = Callable[[RowSource, range, SequenceContext], Targets]
"""Reads what proposal heads learn from this rank's tokens of some rows."""


@dataclass(frozen=True)
class MicroBatch:
    """This rank's tokens of some rows, on the host, and everything its layers are told about them.

    ``targets`` are for proposal heads, where there are any.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    context: SequenceContext
    data_hash: int
    targets: Targets | None = None

    @property
    def labels(self) -> int:
        """Tokens of this rank that have a target."""
        return int((self.labels_BT != IGNORED).sum())


def step_rows(step: int, batch: int, mesh: Mesh) -> range:
    """Rows that this rank's data group trains on in ``step``, counted from 0."""
    share = batch // mesh.data.size
    first = step * batch + mesh.data.rank * share
    return range(first, first + share)


def read_micro_batches(
    source: RowSource, rows: range, micro_batch: int, context_of: Callable[[Documents], SequenceContext],
    targets_of: TargetsOf | None = None,
) -> list[MicroBatch]:  # fmt: skip
    """Read this rank's runs of ``rows``, ``micro_batch`` rows at a time; ``targets_of`` adds what proposal heads learn.

    ``context_of`` cuts each micro-batch by the documents of its rows. All ranks of a sequence know these, so they agree
    on the layout without a message.
    """
    groups = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    return [_read(source, group, context_of, targets_of) for group in groups]


def _read(
    source: RowSource, rows: range, context_of: Callable[[Documents], SequenceContext], targets_of: TargetsOf | None
) -> MicroBatch:
    context = context_of(tuple(source.documents(row) for row in rows))
    read = [source.read(row, context.layout.runs[context.rank]) for row in rows]
    indices = context.layout.indices(context.rank)
    data_hash = sum(_hash(tokens, row, indices) for row, (tokens, _) in zip(rows, read, strict=True))
    tokens_BT, labels_BT = (torch.from_numpy(np.stack([pair[i] for pair in read])) for i in (0, 1))
    targets = None if targets_of is None else targets_of(source, rows, context)
    return MicroBatch(tokens_BT, labels_BT, context, data_hash, targets)


def _hash(tokens: Int64Array, row: int, indices: Int64Array) -> int:
    """A sum over tokens of a 32-bit hash of (token, row, global index): the same for any split over ranks."""
    per_row = np.uint64((row + 1) * 0x165667B19E3779F9 % 2**64)
    mixed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += indices.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F) + per_row
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return int((mixed >> np.uint64(32)).sum())
