"""Which source each training row comes from: exact proportions, seeded order, constant time for any row."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from longctx.data.order import BLOCKS, seeded_permutation
from longctx.errors import DataError

Int64Array = npt.NDArray[np.int64]

BLOCK = 1024  # rows in which the sources have their shares, to within one row each
PERIOD = 64  # blocks after which the shares repeat exactly


class Mixture:
    """Rows of several sources, mixed by weight.

    In every block of :data:`BLOCK` rows each source has its share rounded down or up; which way alternates over a
    period so that no share drifts. Inside a block the sources are shuffled.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Raises :class:`DataError` for a weight so small that its source would never be read."""
        shares = np.asarray(weights, dtype=np.float64)
        counts = _block_counts(shares / shares.sum())
        if not counts.any(axis=0).all():
            smallest = weights[int(np.argmin(counts.sum(axis=0)))]
            raise DataError(f"weight {smallest:g} is below 1 in {BLOCK * PERIOD} rows; raise it or drop that source")
        self._counts = counts
        self._before: Int64Array = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(counts, axis=0)])
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def locate(self, row: int) -> tuple[int, int]:
        """Source of a row and how many earlier rows that source has had."""
        if self._counts.shape[1] == 1:
            return 0, row
        block, place = divmod(row, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        period, phase = divmod(block, PERIOD)
        earlier = period * int(self._before[PERIOD, source]) + int(self._before[phase, source])
        return source, earlier + int(ranks[place])

    def _make_block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """Source of every row of a block, and its rank among the block's rows of that source."""
        counts = self._counts[block % PERIOD]
        sorted_sources = np.repeat(np.arange(len(counts)), counts)
        order = seeded_permutation(BLOCK, self._seed, BLOCKS, 0, block)
        sources = sorted_sources[order]
        ranks = np.empty(BLOCK, np.int64)
        ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
        return sources, ranks


def _block_counts(shares: npt.NDArray[np.float64]) -> Int64Array:
    """Rows per source in each block of a period, int64 [PERIOD, sources]; every block sums to BLOCK.

    The whole parts are given to all blocks. The remainders, laid end to end, are cut at whole numbers shifted by the
    block's phase (systematic sampling): each source receives at most one more row per block, as often as its remainder
    demands. The phases run in bit-reversed order to spread those rows over the period.
    """
    # Whole numbers in units of 1 / PERIOD row, so that no rounding error can lose a row.
    units = np.diff(np.round(np.cumsum(shares) * BLOCK * PERIOD).astype(np.int64), prepend=0)
    whole, rest = np.divmod(units, PERIOD)
    ends = np.cumsum(rest)
    bits = PERIOD.bit_length() - 1
    phases = np.array([int(f"{block:0{bits}b}"[::-1], 2) for block in range(PERIOD)])
    extra = (ends + phases[:, None]) // PERIOD - (ends - rest + phases[:, None]) // PERIOD
    return np.asarray(whole + extra, dtype=np.int64)
