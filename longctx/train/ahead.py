"""Labels of proposal heads: which head learns from which row, and the tokens further right that it learns.

Both follow from the row alone, so it does not show over how many ranks, of what kind, the rows are spread.

Legend: T local tokens, J heads, N pairs of a head and a row.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from longctx.config.schema import Proposals
from longctx.model.head import IGNORED
from longctx.model.proposals import Targets
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Layout, Run
from longctx.train.batches import RowSource

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ahead:
    """How the rows of a run are shared among its proposal heads.

    Args:
        seed: of the draws of a head for each row.
    """

    proposals: Proposals
    seed: int

    def distances(self, row: int) -> tuple[int, ...]:
        """Distances of the heads that learn from a row: all, or one drawn evenly (Stern et al. 2018, section 6)."""
        heads = self.proposals.heads
        if self.proposals.learn == "all":
            return tuple(range(1, heads + 1))
        digest = hashlib.sha256(f"{self.seed}:{row}".encode()).digest()
        return (1 + int.from_bytes(digest[:8], "little") % heads,)

    def targets(self, source: RowSource, rows: range, context: SequenceContext) -> Targets:
        """What the heads learn from this rank's tokens of a micro-batch."""
        chosen = [self.distances(row) for row in rows]
        learning: list[tuple[int, ...]] = []
        labels: list[Int64Array] = []
        for distance in range(1, self.proposals.heads + 1):
            learning.append(tuple(index for index, own in enumerate(chosen) if distance in own))
            labels += [labels_ahead(source, rows[i], distance, context.layout, context.rank) for i in learning[-1]]
        return Targets(torch.from_numpy(np.stack(labels)), tuple(learning))


def labels_ahead(source: RowSource, row: int, distance: int, layout: Layout, rank: int) -> Int64Array:
    """Token t + 1 + distance of every local token t, int64 [T]; -100 across the end of a document or of the row.

    It is the label of token t + distance, which may be another rank's: what is read is moved to the right.
    """
    ahead_T = layout.indices(rank) + distance
    inside_T = ahead_T < layout.length
    moved = [Run(r.start + distance, min(r.stop + distance, layout.length), r.step) for r in layout.runs[rank]]
    labels_T = np.full(len(ahead_T), IGNORED, np.int64)
    labels_T[inside_T] = source.read(row, [run for run in moved if run.start < run.stop])[1]
    starts = np.asarray(source.documents(row))
    document_T, document_ahead_T = (np.searchsorted(starts, at, "right") for at in (ahead_T - distance, ahead_T))
    labels_T[document_T != document_ahead_T] = IGNORED
    return labels_T
