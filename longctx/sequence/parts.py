"""Parts: which rows of a rank's block any other rank needs, so that no others travel. Pure integers.

Found per document from the stretches of it that each rank's pieces reach, without looking at pairs of ranks.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from longctx.sequence.pieces import DocumentKey, Piece, Pieces, Sight

_MANY = -1


@dataclass(frozen=True)
class Part:
    """Some of the ``total`` rows of a block: ascending half-open ranges that do not touch."""

    ranges: tuple[tuple[int, int], ...]
    total: int

    @cached_property
    def size(self) -> int:
        """How many rows."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def whole(self) -> bool:
        """Whether it is all rows."""
        return self.size == self.total

    def place(self, row: int) -> int:
        """The number of a row of the part among its rows."""
        index = bisect_right(self._starts, row) - 1
        return self._places[index] + row - self._starts[index]

    def places(self) -> Iterator[tuple[slice, slice]]:
        """Every range in the block, and where it lies among the rows of the part."""
        for (start, stop), place in zip(self.ranges, self._places, strict=True):
            yield slice(start, stop), slice(place, place + stop - start)

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.ranges]

    @cached_property
    def _places(self) -> list[int]:
        return list(accumulate((stop - start for start, stop in self.ranges[:-1]), initial=0)) if self.ranges else []


class _Stretch(NamedTuple):
    """Tokens [start, stop) of a document that only rank ``sole`` reaches, or several do (_MANY)."""

    start: int
    stop: int
    sole: int


def parts_for_others(
    ours: Sequence[Pieces], theirs: Sequence[Pieces], sight: Sight, totals: Sequence[int]
) -> tuple[Part, ...]:
    """For every rank the tokens x of its pieces in ``ours`` that a token y of another rank's in ``theirs`` needs.

    That is where ``lo <= x - y <= hi``. Exact but for pieces in ``theirs`` with steps longer than the stretch which one
    of their tokens reaches: these count as reaching what lies between two tokens, too.

    Args:
        totals: rows of every rank's block of ``ours``.
    """
    if len(ours) == len(theirs) == 1:
        return (Part((), totals[0]),)
    reached: dict[DocumentKey, list[_Stretch]] = {}
    for rank, pieces in enumerate(theirs):
        for document, others in pieces.items():
            reached.setdefault(document, []).extend(_reach(piece, sight, rank) for piece in others)
    stretches = {document: _flattened(spans) for document, spans in reached.items()}
    starts = {document: [stretch.start for stretch in found] for document, found in stretches.items()}
    parts = []
    for rank, pieces in enumerate(ours):
        ranges: list[tuple[int, int]] = []
        for document, own in pieces.items():
            if document in stretches:
                for piece in own:
                    ranges += _rows(piece, stretches[document], starts[document], rank)
        parts.append(Part(_joined(ranges), totals[rank]))
    return tuple(parts)


def _reach(piece: Piece, sight: Sight, rank: int) -> _Stretch:
    """From the first token that the piece reaches to the last; ends of a document need not be known exactly."""
    start = 0 if sight.lo is None else piece.start + sight.lo
    return _Stretch(start, sys.maxsize if sight.hi is None else piece.last + sight.hi + 1, rank)


def _flattened(spans: Sequence[_Stretch]) -> list[_Stretch]:
    """Overlapping stretches of single ranks as ascending ones side by side, none where nobody reaches."""
    events = sorted([(s.start, 1, s.sole) for s in spans] + [(s.stop, -1, s.sole) for s in spans])
    found: list[_Stretch] = []
    open_spans: dict[int, int] = {}
    for (position, change, rank), (until, _, _) in pairwise(events):
        open_spans[rank] = open_spans.get(rank, 0) + change
        if not open_spans[rank]:
            del open_spans[rank]
        if position == until or not open_spans:
            continue
        sole = next(iter(open_spans)) if len(open_spans) == 1 else _MANY
        if found and found[-1][1:] == (position, sole):
            found[-1] = _Stretch(found[-1].start, until, sole)
        else:
            found.append(_Stretch(position, until, sole))
    return found


def _rows(piece: Piece, stretches: Sequence[_Stretch], starts: Sequence[int], rank: int) -> Iterator[tuple[int, int]]:
    """Local rows of a piece of ``rank`` in stretches that others reach."""
    for index in range(max(bisect_right(starts, piece.start) - 1, 0), len(stretches)):
        start, stop, sole = stretches[index]
        if start > piece.last:
            return
        first = max(-((piece.start - start) // piece.step), 0)
        end = min(-((piece.start - stop) // piece.step), piece.size)
        if sole != rank and first < end:
            yield piece.offset + first, piece.offset + end


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending, neighbours in one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return tuple(joined)
