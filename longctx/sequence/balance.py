"""Which chunks of a packed sequence go to which rank, so that causal attention is even over the ranks. Pure integers.

Every rank gets equally many of equal chunks, so its tokens are even too. Chunks are as large as balance allows: the
larger they are, the fewer runs and slices a rank has. One document gives zigzag, documents that happen to balance as
they lie stay contiguous. Chunks of one document go to few ranks where that costs no balance: ranks that share no
document send each other nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate, pairwise

_ENOUGH = (102, 100)
"""Largest over mean work at which chunks are not halved again."""

_RESERVE = (2, 3)
"""Share of the mean remaining work per chunk that a rank must have left for each chunk it is still to get."""

Document = tuple[int, int]
"""Row in the batch and index of the document in that row."""


def even_cuts(length: int, chunks: int) -> list[int]:
    """Bounds of ``chunks`` nearly equal chunks of ``length`` tokens."""
    return [length * chunk // chunks for chunk in range(chunks + 1)]


def balanced_chunks(length: int, degree: int, documents: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Bounds of chunks, and each rank's chunks. ``documents[b]``: ascending document starts of row b."""
    counts = _chunk_counts(length, degree)
    cuts = even_cuts(length, degree * counts[-1])
    work_before = [sum(row) for row in zip(*(_work_before(cuts, starts) for starts in documents), strict=True)]
    work_before = work_before or [0] * len(cuts)
    crossing = _crossing(cuts, documents)
    best: tuple[int, list[int], list[list[int]]] | None = None
    # If even the smallest chunks leave ranks uneven, once more without regard to who holds which document.
    for count, together in [*((count, True) for count in counts), (counts[-1], False)]:
        # The cuts of few chunks are among those of many.
        every = counts[-1] // count
        work = [b - a for a, b in pairwise(work_before[::every])]
        table = _Table(work, degree)
        table.deal(crossing[::every] if together else [[] for _ in cuts])
        if best is None or max(table.loads) < best[0]:
            best = max(table.loads), cuts[::every], table.hands
        if best[0] * degree * _ENOUGH[1] <= work_before[-1] * _ENOUGH[0]:
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


def _crossing(cuts: Sequence[int], documents: Sequence[Sequence[int]]) -> list[list[Document]]:
    """For each cut the documents, of all rows, that it cuts in two."""
    crossing: list[list[Document]] = [[] for _ in cuts]
    for row, starts in enumerate(documents):
        for here, cut in zip(crossing[1:-1], cuts[1:-1], strict=True):
            place = bisect_right(starts, cut) - 1
            if starts[place] < cut:
                here.append((row, place))
    return crossing


class _Table:
    """Chunks being dealt: the hand of every rank, and the work in it."""

    def __init__(self, work: Sequence[int], degree: int) -> None:
        self.work = work
        self.hands: list[list[int]] = [[] for _ in range(degree)]
        self.loads = [0] * degree
        self._count = len(work) // degree
        self._total = self._left = sum(work)
        self._waiting = len(work)

    def deal(self, crossing: Sequence[Sequence[Document]]) -> None:
        """Heaviest first: to the rank with least work among those that hold the same document, or among all."""
        everyone = [(0, rank) for rank in range(len(self.hands))]
        holders: dict[Document, list[tuple[int, int]]] = {}
        for chunk in sorted(range(len(self.work)), key=lambda chunk: (-self.work[chunk], chunk)):
            self._left -= self.work[chunk]
            self._waiting -= 1
            shared = {*crossing[chunk], *crossing[chunk + 1]}
            near = [self._lightest(holders[document]) for document in shared if document in holders]
            fitting = [rank for rank in near if rank is not None and self._fits(chunk, rank)]
            rank = min(fitting, key=lambda rank: (self.loads[rank], rank)) if fitting else self._lightest(everyone)
            assert rank is not None
            self.hands[rank].append(chunk)
            self.loads[rank] += self.work[chunk]
            for document in shared:
                heappush(holders.setdefault(document, []), (self.loads[rank], rank))

    def _lightest(self, heap: list[tuple[int, int]]) -> int | None:
        """The rank with least work that may get another chunk. Entries of the heap may be out of date: too low."""
        while heap:
            load, rank = heap[0]
            if len(self.hands[rank]) == self._count:
                heappop(heap)
            elif load != self.loads[rank]:
                heapreplace(heap, (self.loads[rank], rank))
            else:
                return rank
        return None

    def _fits(self, chunk: int, rank: int) -> bool:
        """Whether ``rank`` stays below the mean with this chunk, and with light ones for the rest of its hand."""
        more = self._count - len(self.hands[rank]) - 1
        waiting = max(self._waiting, 1)
        # load + work + more * reserve * left / waiting <= total / degree, without fractions.
        needed = _RESERVE[1] * waiting * (self.loads[rank] + self.work[chunk]) + _RESERVE[0] * more * self._left
        return needed * len(self.hands) <= _RESERVE[1] * waiting * self._total
