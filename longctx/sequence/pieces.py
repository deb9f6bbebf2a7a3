"""Pieces: the tokens of one document in one run of one rank, and what one piece sees of others. Pure integers."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.sequence.layout import Documents, Layout
from longctx.sequence.slices import Slice, band

DocumentKey = tuple[int, int]
"""Row in the batch and index of the document in that row."""


class Sight(NamedTuple):
    """A query at position q sees key k of its document when ``lo <= q - k <= hi``; None is no bound."""

    lo: int | None
    hi: int | None

    @staticmethod
    def of(causal: bool, window: int | None) -> "Sight":
        """``window``: tokens a query sees, itself included (bidirectional: to either side)."""
        if window is None:
            return Sight(0 if causal else None, None)
        return Sight(0 if causal else 1 - window, window - 1)

    @property
    def reversed(self) -> "Sight":
        """The same seen from the key: the bounds of ``k - q``."""
        return Sight(None if self.hi is None else -self.hi, None if self.lo is None else -self.lo)


class Piece(NamedTuple):
    """Global tokens ``start, start + step, ...``, ``size`` of them, and the flat local index of the first."""

    start: int
    step: int
    size: int
    offset: int

    @property
    def last(self) -> int:
        """Global index of the last token."""
        return self.start + (self.size - 1) * self.step

    def tokens(self) -> Iterator["Piece"]:
        """The same tokens one by one."""
        return (Piece(self.start + i * self.step, self.step, 1, self.offset + i) for i in range(self.size))


Pieces = dict[DocumentKey, list[Piece]]
"""The pieces of one rank by document, in local order."""


def cut_at_documents(layout: Layout, rank: int, documents: Documents) -> Pieces:
    """Cut the runs of ``rank`` at document starts, for every row of the batch."""
    found: Pieces = {}
    for row, starts in enumerate(documents):
        offset = row * layout.sizes[rank]
        bounds = (*starts, layout.length)
        for start, stop, step in layout.runs[rank]:
            document = bisect_right(starts, start) - 1
            while start < stop:
                while bounds[document + 1] <= start:
                    document += 1
                size = -(-(min(stop, bounds[document + 1]) - start) // step)
                found.setdefault((row, document), []).append(Piece(start, step, size, offset))
                offset += size
                start += size * step
    return found


def piece_slices(q: Piece, k: Piece, sight: Sight) -> Iterator[Slice]:
    """What the tokens of ``q`` see of those of ``k``, in local indices."""
    if q.step != k.step and q.size > 1 and k.size > 1:
        # Visibility moves by no whole number of keys a row: only single tokens make rectangles.
        pairs = ((token, k) for token in q.tokens()) if q.size <= k.size else ((q, token) for token in k.tokens())
        for pair in pairs:
            yield from piece_slices(*pair, sight)
        return
    # Unit indices: the i-th query and the j-th key are ``distance + step * (i - j)`` apart.
    step = k.step if q.size == 1 else q.step
    distance, local = q.start - k.start, q.offset - k.offset
    lo = None if sight.lo is None else local - (distance - sight.lo) // step
    hi = None if sight.hi is None else local + (sight.hi - distance) // step
    yield from band(q.offset, q.offset + q.size, k.offset, k.offset + k.size, lo, hi)


def visible_pairs(q: Piece, document: tuple[int, int], sight: Sight) -> int:
    """How many keys of its document, all tokens of a global [start, stop), the queries of ``q`` see together."""
    start, last = document[0], document[1] - 1
    ends = q.size * last if sight.lo is None else _sum_of_least(last, q, sight.lo)
    begins = q.size * start
    if sight.hi is not None:
        # max(a, b) = a + b - min(a, b)
        begins += _sum_of_least(q.last, q, sight.hi) - _sum_of_least(start, q, sight.hi)
    return ends - begins + q.size


def _sum_of_least(cap: int, q: Piece, distance: int) -> int:
    """Sum over the tokens t of ``q`` of ``min(cap, t - distance)``."""
    first = q.start - distance
    below = min(max((cap - first) // q.step + 1, 0), q.size)
    return below * first + q.step * below * (below - 1) // 2 + (q.size - below) * cap


def seen_ranks(queries: Sequence[Pieces], keys: Sequence[Pieces], sight: Sight) -> npt.NDArray[np.bool_]:
    """bool [ranks of queries, ranks of keys]: whether any query of the one sees any key of the other."""
    found = np.zeros((len(queries), len(keys)), dtype=bool)
    columns: dict[DocumentKey, list[tuple[int, ...]]] = {}
    for rank, pieces in enumerate(keys):
        for document, own in pieces.items():
            columns.setdefault(document, []).extend((k.start, k.last, k.step, k.size, rank) for k in own)
    tables = {document: _KeyTable.of(rows) for document, rows in columns.items()}
    for rank, pieces in enumerate(queries):
        for document, own in pieces.items():
            if found[rank].all():
                break
            if document in tables:
                # Without a window the last query sees whatever an earlier one does.
                for q in [max(own, key=lambda q: q.last)] if sight.hi is None else own:
                    found[rank, tables[document].ranks_seen(q, sight)] = True
    return found


class _KeyTable(NamedTuple):
    """All key pieces of one document as columns, in the order of their first tokens."""

    first: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    furthest: npt.NDArray[np.int64]
    """Largest token of this piece and all before it."""

    @staticmethod
    def of(rows: list[tuple[int, ...]]) -> "_KeyTable":
        first, last, step, size, rank = np.array(sorted(rows), dtype=np.int64).T
        return _KeyTable(first, step, size, rank, np.maximum.accumulate(last))

    def ranks_seen(self, q: Piece, sight: Sight) -> npt.NDArray[np.int64]:
        """Ranks with a key that some token of ``q`` sees."""
        stop = len(self.first) if sight.lo is None else int(np.searchsorted(self.first, q.last - sight.lo, "right"))
        if sight.hi is None:
            return self.rank[:stop]
        start = int(np.searchsorted(self.furthest, q.start - sight.hi))
        near = _KeyTable(*(column[start:stop] for column in self))
        return near.rank[near._seen(q, sight)]

    def _seen(self, q: Piece, sight: Sight) -> npt.NDArray[np.bool_]:
        """Which of the pieces have a key that ``q`` sees, for a sight with two bounds."""
        assert sight.lo is not None
        assert sight.hi is not None
        if (self.step != q.step).any() and q.size > 1:
            seen: npt.NDArray[np.bool_] = np.any([self._seen(token, sight) for token in q.tokens()], axis=0)
            return seen
        # A query's index less a key's lies in [lo, hi] (see piece_slices) and in [1 - size, q.size - 1].
        distance = q.start - self.first
        lo = np.maximum(-((distance - sight.lo) // self.step), 1 - self.size)
        hi = np.minimum((sight.hi - distance) // self.step, q.size - 1)
        seen = lo <= hi
        return seen
