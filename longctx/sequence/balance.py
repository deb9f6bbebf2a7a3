"""Which chunks of a packed sequence go to which rank, so that causal attention is even over the ranks. Pure integers.

Every rank gets equally many of equal chunks, so its tokens are even too. Chunks are as large as balance allows: the
larger they are, the fewer runs and slices a rank has. One document gives zigzag, documents that happen to balance as
they lie stay contiguous.
"""

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heapreplace
from itertools import accumulate, pairwise

_ENOUGH = (102, 100)
"""Largest over mean work at which chunks are not halved again."""


def even_cuts(length: int, chunks: int) -> list[int]:
    """Bounds of ``chunks`` nearly equal chunks of ``length`` tokens."""
    return [length * chunk // chunks for chunk in range(chunks + 1)]


def balanced_chunks(length: int, degree: int, documents: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Bounds of chunks, and each rank's chunks. ``documents[b]``: ascending document starts of row b."""
    counts = _chunk_counts(length, degree)
    cuts = even_cuts(length, degree * counts[-1])
    work_before = [sum(row) for row in zip(*(_work_before(cuts, starts) for starts in documents), strict=True)]
    work_before = work_before or [0] * len(cuts)
    best: tuple[int, list[int], list[list[int]]] | None = None
    for count in counts:
        # The cuts of few chunks are among those of many.
        every = counts[-1] // count
        chunks, most = _deal([b - a for a, b in pairwise(work_before[::every])], degree)
        if best is None or most < best[0]:
            best = most, cuts[::every], chunks
        if most * degree * _ENOUGH[1] <= work_before[-1] * _ENOUGH[0]:
            break
    assert best is not None
    # Ranks in the order of their first tokens: ranks that share a document are near each other.
    return best[1], sorted(sorted(own) for own in best[2])


def _chunk_counts(length: int, degree: int) -> list[int]:
    """Chunks per rank to try: powers of two, while a chunk has at least as many tokens as a rank has chunks.

    Chunks differ by one token, so a rank's tokens then differ from another's by no more than one chunk.
    """
    counts = [1]
    if length >= 2 * degree:
        counts.append(2)
    while (2 * counts[-1]) ** 2 <= length // degree:
        counts.append(2 * counts[-1])
    return counts


def _work_before(cuts: Sequence[int], starts: Sequence[int]) -> list[int]:
    """Causal query-key pairs of all queries before each cut, for one row."""
    areas = list(accumulate((_triangle(b - a) for a, b in pairwise(starts)), initial=0))
    places = [bisect_right(starts, cut) - 1 for cut in cuts]
    return [areas[place] + _triangle(cut - starts[place]) for cut, place in zip(cuts, places, strict=True)]


def _triangle(rows: int) -> int:
    return rows * (rows + 1) // 2


def _deal(work: list[int], degree: int) -> tuple[list[list[int]], int]:
    """Give each rank equally many chunks: the heaviest left to the rank that has least so far. And the largest sum."""
    count = len(work) // degree
    hands: list[list[int]] = [[] for _ in range(degree)]
    loads = [(0, rank) for rank in range(degree)]  # ascending, so already a heap
    most = 0
    for chunk in sorted(range(len(work)), key=lambda chunk: (-work[chunk], chunk)):
        load, rank = loads[0]
        hands[rank].append(chunk)
        load += work[chunk]
        most = max(most, load)
        if len(hands[rank]) == count:
            heappop(loads)
        else:
            heapreplace(loads, (load, rank))
    return hands, most
