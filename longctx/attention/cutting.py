"""Slices cut into the blocks that a dense kernel takes in one call. Pure integers.

A kernel that computes what a triangle hides is given trapezoids: a few query rows over all keys of their block up to
the diagonal, so that little is hidden. A triangle of n rows is blocks of B rows along the diagonal, each cut into such
strips, and squares below them: of B rows between the blocks of a pair, of 2B between the pairs, and so on. Equal
blocks at equal distances are one cut: one call with a batch dimension, of views.
"""

from collections.abc import Iterator
from typing import NamedTuple

from longctx.sequence.slices import Mask, Slice

SPAN = 2048
"""Most rows that the blocks of one cut stretch over: more of them would fall out of the caches between two passes."""


class Cut(NamedTuple):
    """``number`` blocks: block i has query rows from ``q + i * stride`` on and keys from ``k + i * stride`` on.

    A causal block has at least as many keys as rows, and its last row sees all of them; an anticausal one is a causal
    one read from its end on both axes.
    """

    q: int
    k: int
    rows: int
    columns: int
    mask: Mask
    number: int = 1
    stride: int = 0


def cuts(s: Slice, strip: tuple[int, int] | None, tile: tuple[int, int] | None) -> Iterator[Cut]:
    """The work of a slice, each query-key pair once.

    Args:
        strip: rows of a strip and of a block of strips (a multiple), or None to leave triangles as they are.
        tile: most rows and most keys of a block; None for no limit.
    """
    rows, columns = s.q_end - s.q_start, s.k_end - s.k_start
    if s.mask == "full" or strip is None:
        found = [Cut(0, 0, rows, columns, s.mask)]
    else:
        found = [piece for cut in _strips(rows, *strip) for piece in _within_span(cut)]
        if s.mask == "anticausal":
            found = [_mirrored(cut, rows) for cut in found]
    for cut in found:
        for piece in _tiles(cut, tile):
            yield piece._replace(q=piece.q + s.q_start, k=piece.k + s.k_start)


def _strips(rows: int, strip: int, block: int) -> Iterator[Cut]:
    """A causal triangle of ``rows`` rows; of the strips the longest first, so that each key is met early."""
    rest = rows % strip
    if rest:
        start = (rows - 1) // block * block
        yield Cut(rows - rest, start, rest, rows - start, "causal")
    for stop in range(min(block, rows - rest), 0, -strip):
        yield Cut(stop - strip, 0, strip, stop, "causal", 1 + (rows - stop) // block, block)
    size = block
    while size < rows:
        whole, left = divmod(rows, 2 * size)
        if whole:
            yield Cut(size, 0, size, size, "full", whole, 2 * size)
        if left > size:
            yield Cut(rows - left + size, rows - left, left - size, size, "full")
        size *= 2


def _within_span(cut: Cut) -> Iterator[Cut]:
    """The same blocks in parts that stretch over no more than :data:`SPAN` rows."""
    most = max(1, SPAN // cut.stride) if cut.number > 1 else 1
    for first in range(0, cut.number, most):
        ahead = first * cut.stride
        yield cut._replace(q=cut.q + ahead, k=cut.k + ahead, number=min(most, cut.number - first))


def _mirrored(cut: Cut, size: int) -> Cut:
    """The cut of a causal triangle as one of an anticausal triangle: both axes read from their ends."""
    last = (cut.number - 1) * cut.stride
    q, k = size - cut.q - cut.rows - last, size - cut.k - cut.columns - last
    return cut._replace(q=q, k=k, mask="anticausal" if cut.mask == "causal" else "full")


def _tiles(cut: Cut, tile: tuple[int, int] | None) -> Iterator[Cut]:
    if tile is None or (cut.rows <= tile[0] and cut.columns <= tile[1]):
        yield cut
        return
    height, width = (tile[0], _even(cut.columns, tile[1])) if cut.mask == "full" else (min(tile), min(tile))
    for piece in tiles(Slice(0, cut.rows, 0, cut.columns, cut.mask), height, width):
        rows, columns = piece.q_end - piece.q_start, piece.k_end - piece.k_start
        yield cut._replace(
            q=cut.q + piece.q_start, k=cut.k + piece.k_start, rows=rows, columns=columns, mask=piece.mask
        )


def tiles(s: Slice, height: int, width: int) -> Iterator[Slice]:
    """The same work in slices of at most ``height`` rows and ``width`` columns, which are equal unless it is full."""
    for q in range(s.q_start, s.q_end, height):
        for k in range(s.k_start, s.k_end, width):
            # A triangle is square, so its diagonal runs through tiles of equal place, and one side of it is empty.
            ahead = (k - s.k_start) - (q - s.q_start)
            if (s.mask == "causal" and ahead > 0) or (s.mask == "anticausal" and ahead < 0):
                continue
            yield Slice(q, min(q + height, s.q_end), k, min(k + width, s.k_end), "full" if ahead else s.mask)


def _even(columns: int, most: int) -> int:
    """Width of the fewest tiles of at most ``most`` keys, rounded to vectors, and no power of two where there is room.

    A tile whose rows are 256 or 512 numbers long has them at the same places of a cache.
    """
    width = -(-columns // -(-columns // most))
    rounded = -(-width // 32) * 32
    rounded += 32 * (rounded % 256 == 0)
    return rounded if rounded <= most else width
