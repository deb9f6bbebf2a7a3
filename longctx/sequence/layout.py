"""A layout: which global runs of a sequence each rank holds. Pure integers.

A rank's local order is the order of its runs. Those of the layouts by name ascend; where ranks of a striped layout are
joined, their runs interleave. Lengths need not divide anything: shards may be uneven or empty.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from longctx.sequence.balance import balanced_chunks, even_cuts

Documents = tuple[tuple[int, ...], ...]
"""Per row of the batch the ascending global start offsets of its documents; the first is 0."""


class Run(NamedTuple):
    """Global token indices ``start, start + step, ...`` below ``stop``; ``stop`` is one past the last of them."""

    start: int
    stop: int
    step: int = 1

    @property
    def size(self) -> int:
        """Tokens of the run."""
        return -(-(self.stop - self.start) // self.step)


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
        return tuple(sum(run.size for run in runs) for runs in self.runs)

    def indices(self, rank: int) -> npt.NDArray[np.int64]:
        """Global index of each local token of ``rank``, int64 [T]."""
        pieces = [np.arange(*run, dtype=np.int64) for run in self.runs[rank]]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


class LayoutMaker(Protocol):
    """Cuts ``length`` tokens over ``degree`` ranks; a pure function, so that all ranks agree without a message."""

    def __call__(self, length: int, degree: int, documents: Documents = ()) -> Layout: ...


def contiguous(length: int, degree: int, documents: Documents = ()) -> Layout:
    """Rank p holds the p-th of ``degree`` nearly equal chunks."""
    return _of_chunks(length, even_cuts(length, degree), ([p] for p in range(degree)))


def zigzag(length: int, degree: int, documents: Documents = ()) -> Layout:
    """Rank p holds chunks p and 2P-1-p of 2P nearly equal ones, which balances causal attention."""
    return _of_chunks(length, even_cuts(length, 2 * degree), ([p, 2 * degree - 1 - p] for p in range(degree)))


def striped(length: int, degree: int, documents: Documents = ()) -> Layout:
    """Rank p holds tokens p, p + P, p + 2P, ... (Striped Attention, arXiv 2311.09431): every hop is a triangle."""
    lasts = [p + (length - 1 - p) // degree * degree for p in range(degree)]
    return Layout(length, tuple((Run(p, last + 1, degree),) if p < length else () for p, last in enumerate(lasts)))


def balanced(length: int, degree: int, documents: Documents = ()) -> Layout:
    """Chunks are dealt so that ranks hold equally many tokens and equal causal work over all rows of ``documents``.

    Work is the number of visible query-key pairs of full causal attention inside documents. Windows and bidirectional
    attention are not looked at: their work is as even as the tokens where documents are much longer than the window,
    and may be less even than that where windows and documents are of a size.
    """
    cuts, chunks = balanced_chunks(length, degree, documents)
    return _of_chunks(length, cuts, chunks)


LAYOUTS: Mapping[str, LayoutMaker] = MappingProxyType(
    {"contiguous": contiguous, "zigzag": zigzag, "striped": striped, "balanced": balanced}
)


def _of_chunks(length: int, cuts: list[int], chunks: Iterable[list[int]]) -> Layout:
    """The layout that gives each rank its chunks, which are ascending numbers of gaps between cuts."""
    bounds = list(pairwise(cuts))
    return Layout(length, tuple(_joined(Run(*bounds[chunk]) for chunk in own) for own in chunks))


def _joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Drop empty runs and join neighbours."""
    joined: list[Run] = []
    for run in runs:
        if run.start == run.stop:
            continue
        if joined and joined[-1].stop == run.start:
            joined[-1] = Run(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)
