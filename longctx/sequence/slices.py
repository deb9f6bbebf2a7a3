"""Slices: dense blocks of attention work, and how a diagonal band is cut into them. Pure integers."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

Mask = Literal["full", "causal", "anticausal"]


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


def band(qa: int, qb: int, ka: int, kb: int, lo: int | None, hi: int | None) -> Iterator[Slice]:
    """Cut the pairs of queries [qa, qb) x keys [ka, kb) with ``lo <= q - k <= hi`` into slices.

    None is no bound; causal attention has ``lo = 0``, a window of w has ``hi = w - 1``. Each pair that fulfils both
    bounds lies in exactly one slice.
    """
    if qa >= qb or ka >= kb:
        return
    lowest, highest = qa - kb + 1, qb - 1 - ka
    # A bound that excludes nothing is moved out of the corners, where it would cut a stripe for nothing.
    lo = lowest - 1 if lo is None or lo <= lowest else lo
    hi = highest + 1 if hi is None or hi >= highest else hi
    if lo > highest or hi < lowest or lo > hi:
        return
    if lo < lowest and hi > highest:
        yield Slice(qa, qb, ka, kb, "full")
        return
    # Row q sees [max(ka, q - hi), min(kb, q - lo + 1)): cut where either end stops or starts moving.
    corners = {qa, qb, ka + lo, kb + lo, ka + hi, kb + hi}
    rows = sorted(corner for corner in corners if qa <= corner <= qb)
    for top, bottom in pairwise(rows):
        yield from _stripe(top, bottom, ka, kb, lo, hi)


def _stripe(top: int, bottom: int, ka: int, kb: int, lo: int, hi: int) -> Iterator[Slice]:
    """Slices of rows [top, bottom), within which each end is either constant or moves one key per row."""
    low, high = max(ka, top - hi), min(kb, top - lo + 1)
    if low >= kb or high <= ka:
        return
    low_moves = bottom - hi - 1 > low
    high_moves = min(kb, bottom - lo) > high
    height = bottom - top
    if low_moves and high_moves and height >= high - low:
        # The two triangles of a stripe must not meet: halve it until its rows share at least one key.
        if high - low == 1:
            for row in range(top, bottom):
                yield Slice(row, row + 1, row - hi, row - hi + 1, "full")
            return
        step = high - low - 1
        for start in range(top, bottom, step):
            yield from _stripe(start, min(start + step, bottom), ka, kb, lo, hi)
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


def coalesced(slices: list[Slice]) -> list[Slice]:
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
