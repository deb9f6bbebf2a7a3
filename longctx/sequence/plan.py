"""AttentionPlan: which slices of which hop are computed and which blocks are sent. Pure integers, no tensors.

Causality, documents, windows and sharding all become slices ``(q_start, q_end, k_start, k_end, mask)`` over the
flattened batch x local-token axes of the query rank and the key rank. A window's band is cut into triangles and
rectangles.
Every rank plans for all ranks, so senders and receivers agree without a message.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.sequence.layout import Layout

Mask = Literal["full", "causal", "anticausal"]
Documents = tuple[tuple[int, ...], ...]


class Slice(NamedTuple):
    """One dense block of work. ``causal``: square, key index <= query index; ``anticausal``: square, key >= query."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    mask: Mask

    @property
    def area(self) -> int:
        """Query-key pairs that are computed."""
        rows, columns = self.q_end - self.q_start, self.k_end - self.k_start
        return rows * columns if self.mask == "full" else rows * (rows + 1) // 2


class Piece(NamedTuple):
    """Tokens of one document in one run of one rank: global [start, stop), flat local index of the first."""

    start: int
    stop: int
    offset: int


DocumentKey = tuple[int, int]
"""Row in the batch and index of the document in that row."""


@dataclass(frozen=True)
class AttentionPlan:
    """Self- or cross-attention of the tokens of ``queries`` over those of ``keys``; both describe the same rows.

    ``window`` is the number of tokens a query sees, itself included; None for no limit.
    """

    queries: Layout
    keys: Layout
    documents: Documents
    causal: bool = True
    window: int | None = None
    _found: dict[tuple[int, int], tuple[Slice, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def degree(self) -> int:
        return self.keys.degree

    def slices(self, rank: int, source: int) -> tuple[Slice, ...]:
        """Work of query rank ``rank`` on the keys of rank ``source``; found once, then shared by all layers."""
        if (rank, source) not in self._found:
            self._found[rank, source] = tuple(_coalesced(list(self._uncoalesced(rank, source))))
        return self._found[rank, source]

    def needs(self, rank: int, source: int) -> bool:
        """Whether ``rank`` has any work on the keys of ``source``."""
        keys = self._key_pieces[source]
        return any(
            next(self._band(q, k), None) is not None
            for document, q_pieces in self._query_pieces[rank].items()
            for q in q_pieces
            for k in keys.get(document, ())
        )

    def needed_pairs(self) -> npt.NDArray[np.bool_]:
        """[query ranks, key ranks]: whether the one has any work on the keys of the other."""
        ranks, sources = range(self.queries.degree), range(self.keys.degree)
        return np.array([[self.needs(rank, source) for source in sources] for rank in ranks])

    def _uncoalesced(self, rank: int, source: int) -> Iterator[Slice]:
        keys = self._key_pieces[source]
        for document, q_pieces in self._query_pieces[rank].items():
            for q in q_pieces:
                for k in keys.get(document, ()):
                    yield from (_moved(s, q, k) for s in self._band(q, k))

    def _band(self, q: Piece, k: Piece) -> Iterator[Slice]:
        return band(q.start, q.stop, k.start, k.stop, self.causal, self.window)

    @cached_property
    def _query_pieces(self) -> list[dict[DocumentKey, list[Piece]]]:
        return [_pieces(self.queries, rank, self.documents) for rank in range(self.queries.degree)]

    @cached_property
    def _key_pieces(self) -> list[dict[DocumentKey, list[Piece]]]:
        if self.keys is self.queries:
            return self._query_pieces
        return [_pieces(self.keys, rank, self.documents) for rank in range(self.keys.degree)]


def band(qa: int, qb: int, ka: int, kb: int, causal: bool, window: int | None) -> Iterator[Slice]:
    """Cut the visible part of queries [qa, qb) x keys [ka, kb) (global positions) into slices.

    A query at position q sees key k when ``k <= q`` (causal) and ``|q - k| < window``. Each visible pair lies in
    exactly one slice.
    """
    if qa >= qb or ka >= kb:
        return
    reach = max(qb, kb) - min(qa, ka) + 1 if window is None else window
    ahead = 0 if causal else reach - 1
    # Row q sees [max(ka, q - reach + 1), min(kb, q + ahead + 1)): cut where either bound stops or starts moving.
    corners = {qa, qb, ka - ahead, kb - ahead, ka + reach - 1, kb + reach - 1}
    rows = sorted(corner for corner in corners if qa <= corner <= qb)
    for top, bottom in pairwise(rows):
        yield from _stripe(top, bottom, ka, kb, reach, ahead)


def _stripe(top: int, bottom: int, ka: int, kb: int, reach: int, ahead: int) -> Iterator[Slice]:
    """Slices of rows [top, bottom), within which each bound is either constant or moves one key per row."""
    low, high = max(ka, top - reach + 1), min(kb, top + ahead + 1)
    if low >= kb or high <= ka:
        return
    low_moves = bottom - reach > low
    high_moves = min(kb, bottom + ahead) > high
    height = bottom - top
    if low_moves and high_moves and height >= high - low:
        # The two triangles of a stripe must not meet: halve it until its rows share at least one key.
        if high - low == 1:
            for row in range(top, bottom):
                yield Slice(row, row + 1, row - reach + 1, row - reach + 2, "full")
            return
        step = high - low - 1
        for start in range(top, bottom, step):
            yield from _stripe(start, min(start + step, bottom), ka, kb, reach, ahead)
        return
    inner_low, inner_high = low, high
    if low_moves:
        yield Slice(top, bottom, low, low + height, "anticausal")
        inner_low = low + height
    if high_moves:
        yield Slice(top, bottom, high - 1, high - 1 + height, "causal")
        inner_high = high - 1
    if inner_low < inner_high:
        yield Slice(top, bottom, inner_low, inner_high, "full")


def _pieces(layout: Layout, rank: int, documents: Documents) -> dict[DocumentKey, list[Piece]]:
    """Cut the runs of ``rank`` at document starts, for every row of the batch."""
    found: dict[DocumentKey, list[Piece]] = {}
    for row, starts in enumerate(documents):
        offset = row * layout.sizes[rank]
        bounds = (*starts, layout.length)
        document = 0
        for start, stop in layout.runs[rank]:
            while start < stop:
                while bounds[document + 1] <= start:
                    document += 1
                end = min(stop, bounds[document + 1])
                found.setdefault((row, document), []).append(Piece(start, end, offset))
                offset += end - start
                start = end
    return found


def _moved(s: Slice, q: Piece, k: Piece) -> Slice:
    """From global positions to flat local indices."""
    dq, dk = q.offset - q.start, k.offset - k.start
    return Slice(s.q_start + dq, s.q_end + dq, s.k_start + dk, s.k_end + dk, s.mask)


def _coalesced(slices: list[Slice]) -> list[Slice]:
    """Join full rectangles that share their queries and touch in their keys, then the other way round."""
    by_keys = _join(slices, lambda s: (s.q_start, s.q_end, s.k_start), _join_keys)
    return _join(by_keys, lambda s: (s.k_start, s.k_end, s.q_start), _join_queries)


def _join(
    slices: list[Slice], order: Callable[[Slice], tuple[int, ...]], pair: Callable[[Slice, Slice], Slice | None]
) -> list[Slice]:
    joined: list[Slice] = []
    for s in sorted((s for s in slices if s.mask == "full"), key=order):
        both = pair(joined[-1], s) if joined else None
        if both:
            joined[-1] = both
        else:
            joined.append(s)
    return [s for s in slices if s.mask != "full"] + joined


def _join_keys(a: Slice, b: Slice) -> Slice | None:
    same = (a.q_start, a.q_end, a.k_end) == (b.q_start, b.q_end, b.k_start)
    return Slice(a.q_start, a.q_end, a.k_start, b.k_end, "full") if same else None


def _join_queries(a: Slice, b: Slice) -> Slice | None:
    same = (a.k_start, a.k_end, a.q_end) == (b.k_start, b.k_end, b.q_start)
    return Slice(a.q_start, b.q_end, a.k_start, a.k_end, "full") if same else None
