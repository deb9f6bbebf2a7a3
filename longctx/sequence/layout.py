"""A layout: which global runs of a sequence each rank holds. Pure integers.

Runs are half-open ``(start, stop)`` pairs of global token indices, ascending and disjoint within a rank; a rank's local
order is the order of its runs. Lengths need not divide anything: shards may be uneven or empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Run = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """``runs[p]`` are the runs of rank ``p`` out of a sequence of ``length`` tokens."""

    length: int
    runs: tuple[tuple[Run, ...], ...]

    @property
    def degree(self) -> int:
        return len(self.runs)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Local tokens of every rank."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    def indices(self, rank: int) -> npt.NDArray[np.int64]:
        """Global index of each local token of ``rank``, int64 [T]."""
        pieces = [np.arange(start, stop, dtype=np.int64) for start, stop in self.runs[rank]]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def contiguous(length: int, degree: int) -> Layout:
    """Rank p holds the p-th of ``degree`` nearly equal chunks."""
    cuts = _cuts(length, degree)
    return Layout(length, tuple(_joined([(cuts[p], cuts[p + 1])]) for p in range(degree)))


def zigzag(length: int, degree: int) -> Layout:
    """Rank p holds chunks p and 2P-1-p of 2P nearly equal ones, which balances causal attention."""
    cuts = _cuts(length, 2 * degree)
    pairs = ([p, 2 * degree - 1 - p] for p in range(degree))
    return Layout(length, tuple(_joined([(cuts[c], cuts[c + 1]) for c in pair]) for pair in pairs))


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}


def _cuts(length: int, chunks: int) -> list[int]:
    return [length * chunk // chunks for chunk in range(chunks + 1)]


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Drop empty runs and join neighbours."""
    joined: list[Run] = []
    for start, stop in runs:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
