"""A sequence as segments, each cut over all ranks, with memory tokens before and behind it. Integers and contexts.

Legend: B batch, T local tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from longctx.config.schema import Recurrence
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Documents, Layout, LayoutMaker, Run


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens [start, stop) of every row, with memory tokens before and behind them.

    ``context`` is that of the longer sequence, which on this rank begins with ``before`` memory tokens and ends with
    ``behind`` ones. A document that starts in a segment knows nothing of the memory before it.

    Args:
        number: its place among the segments of the sequence.
        rows: this rank's tokens of the segment among its local ones.
        owner: rank that holds the memory tokens behind.
        fresh_read: of each row, whether a document starts with the segment, so that nothing is to be read.
        fresh_write: of each row, whether a document starts in it, so that what it writes builds on nothing before.
    """

    number: int
    start: int
    stop: int
    rows: slice
    context: SequenceContext
    before: int
    behind: int
    owner: int
    fresh_read: tuple[bool, ...]
    fresh_write: tuple[bool, ...]


def segmented(maker: LayoutMaker, segment: int) -> LayoutMaker:
    """The layout that cuts every segment of ``segment`` tokens as ``maker`` cuts a sequence."""

    def cut(length: int, degree: int, documents: Documents = ()) -> Layout:
        runs: list[list[Run]] = [[] for _ in range(degree)]
        for start in range(0, length, segment):
            stop = min(start + segment, length)
            inside = tuple(_inside(row, start, stop) for row in documents)
            for own, part in zip(runs, maker(stop - start, degree, inside).runs, strict=True):
                own += [Run(r.start + start, r.stop + start, r.step) for r in part]
        return Layout(length, tuple(tuple(own) for own in runs))

    return cut


def whole_segments(segment: int) -> LayoutMaker:
    """The layout that deals whole segments of ``segment`` tokens to the ranks in turn."""

    def cut(length: int, degree: int, documents: Documents = ()) -> Layout:
        runs = [Run(start, min(start + segment, length)) for start in range(0, length, segment)]
        return Layout(length, tuple(tuple(runs[rank::degree]) for rank in range(degree)))

    return cut


def layout_maker(name: str, recurrence: Recurrence | None) -> LayoutMaker:
    """The layout called ``name``, segment by segment where there is a recurrence; a wavefront has its own."""
    if recurrence is None:
        return LAYOUTS[name]
    return whole_segments(recurrence.segment) if recurrence.wavefront else segmented(LAYOUTS[name], recurrence.segment)


def with_resets(documents: Documents, tokens: int, length: int) -> Documents:
    """The documents, all cut after every ``tokens`` tokens: a memory is carried no further than that."""
    return tuple(tuple(sorted({*row, *range(0, length, tokens)})) for row in documents)


def segments_of(context: SequenceContext, segment: int, before: int, behind: int) -> tuple[Segment, ...]:
    """The segments of a context whose layout was made by :func:`segmented`, found once.

    Args:
        before, behind: memory tokens of each segment.

    Raises:
        ValueError: a rank's tokens do not come segment by segment.
    """
    key = ("segments", context.rank, segment, before, behind)
    found: tuple[Segment, ...] = context.once(key, partial(_find, context, segment, (before, behind)))
    return found


def _find(context: SequenceContext, segment: int, memory: tuple[int, int]) -> tuple[Segment, ...]:
    bounds = [*range(context.past, context.length, segment), context.length]
    pieces = [[_pieces(runs, a, b) for a, b in pairwise(bounds)] for runs in context.layout.runs]
    for runs, parts in zip(context.layout.runs, pieces, strict=True):
        if sum(r.size for r in runs) != sum(r.size for part in parts for r in part):
            raise ValueError("the runs of a rank do not come segment by segment; make the layout with segmented()")
    found, first = [], 0
    for number, (start, stop) in enumerate(pairwise(bounds)):
        parts = [own[number] for own in pieces]
        size = sum(run.size for run in parts[context.rank])
        found.append(_segment(context, (number, start, stop), parts, slice(first, first + size), memory))
        first += size
    return tuple(found)


def own_segments_of(context: SequenceContext, segment: int, behind: int) -> tuple[Segment, ...]:
    """This rank's segments of a context whose layout was made by :func:`whole_segments`, each on one rank alone.

    Args:
        behind: memory tokens of each segment.
    """

    def find() -> tuple[Segment, ...]:
        found, first = [], 0
        for run in context.layout.runs[context.rank]:
            inside = tuple(_inside(starts, run.start, run.stop) for starts in context.documents)
            alone = SequenceContext.single(context.batch, run.size + behind, inside)
            rows, fresh = slice(first, first + run.size), _fresh(context, run.start, inside)
            place = (run.start // segment, run.start, run.stop)
            found.append(Segment(*place, rows, alone, 0, behind, 0, *fresh))
            first += run.size
        return tuple(found)

    segments: tuple[Segment, ...] = context.once(("own segments", context.rank, segment, behind), find)
    return segments


def _segment(
    context: SequenceContext, place: tuple[int, int, int], parts: Sequence[Sequence[Run]], rows: slice,
    memory: tuple[int, int],
) -> Segment:  # fmt: skip
    _, start, stop = place
    reader = min((runs[0].start, rank) for rank, runs in enumerate(parts) if runs)[1]
    writer = max((runs[-1].stop, rank) for rank, runs in enumerate(parts) if runs)[1]
    (before, behind), runs = memory, []
    last = before + stop - start
    for rank, own in enumerate(parts):
        moved = [Run(r.start - start + before, r.stop - start + before, r.step) for r in own]
        moved = [Run(0, before)] * bool(before and rank == reader) + moved
        runs.append(tuple(_joined(moved + [Run(last, last + behind)] * bool(behind and rank == writer))))
    inside = [_inside(starts, start, stop) for starts in context.documents]
    documents = tuple((0, *(d + before for d in own if d)) for own in inside)
    inner = SequenceContext(
        context.group, Layout(last + behind, tuple(runs)), documents, scheme=context.scheme, ledger=context.ledger
    )
    own_before, own_behind = before * (context.rank == reader), behind * (context.rank == writer)
    return Segment(*place, rows, inner, own_before, own_behind, writer, *_fresh(context, start, inside))


def _fresh(
    context: SequenceContext, start: int, inside: Sequence[Sequence[int]]
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """``fresh_read`` and ``fresh_write`` of the segment from ``start`` with the documents ``inside``."""
    fresh = tuple(start in starts for starts in context.documents)
    return fresh, tuple(new or len(own) > 1 for new, own in zip(fresh, inside, strict=True))


def _pieces(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The parts of runs inside [start, stop)."""
    found = []
    for run in runs:
        first = max(run.start, run.start + -(-(start - run.start) // run.step) * run.step)
        last = min(run.stop, stop)
        if first < last:
            found.append(Run(first, last, run.step))
    return found


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbouring runs as one."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].stop == run.start and joined[-1].step == run.step == 1:
            joined[-1] = Run(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


def _inside(starts: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Document starts of [start, stop), counted from ``start``; the first is 0."""
    return (0, *(d - start for d in starts if start < d < stop))
