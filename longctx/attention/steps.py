"""Slices as calls of a kernel: cut into tiles, or grouped for kernels that take many blocks in one call.

Pure integers, found once per hop and kept with its slices; only the tables that a device needs are tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from longctx.attention.kernels import Kernel, Segments
from longctx.sequence.slices import Mask, Slice, Slices

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor, in order: a view where they are neighbours, a copy where not.

    ``ranges`` are half-open, none empty; with ``reverse`` each is read from its end.
    """

    ranges: Ranges
    reverse: bool = False
    _indices: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def span(self) -> slice | None:
        """All of them as one slice, or None."""
        (start, stop), *others = self.ranges
        for next_start, next_stop in others:
            if next_start != stop:
                return None
            stop = next_stop
        return None if self.reverse else slice(start, stop)

    @cached_property
    def host(self) -> slice | npt.NDArray[np.int64]:
        """For arrays on the host."""
        if self.span is not None:
            return self.span
        pieces = [np.arange(start, stop, dtype=np.int64) for start, stop in self.ranges]
        return np.concatenate([piece[::-1] if self.reverse else piece for piece in pieces])

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.span] if self.span is not None else tensor.index_select(0, self._index(tensor))

    def assign_(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        if self.span is not None:
            tensor[self.span] = rows
        else:
            tensor.index_copy_(0, self._index(tensor), rows.to(tensor.dtype))

    def add_(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        if self.span is not None:
            tensor[self.span] += rows
        else:
            tensor.index_add_(0, self._index(tensor), rows.to(tensor.dtype))

    def _index(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device not in self._indices:
            self._indices[tensor.device] = torch.as_tensor(self.host, device=tensor.device)
        return self._indices[tensor.device]


@dataclass(frozen=True)
class Step:
    """One call: ``segments`` for a kernel that takes many blocks in one, None for one dense block of ``mask``."""

    rows: Rows
    columns: Rows
    mask: Mask
    segments: Segments | None = None


def steps_of(slices: Sequence[Slice], kernel: Kernel) -> tuple[Step, ...]:
    """The calls of ``kernel`` that do the work of ``slices``, each query-key pair once."""
    made = slices.made if isinstance(slices, Slices) else {}
    key = ("steps", kernel.tile, kernel.triangle, kernel.varlen is not None)
    if key not in made:
        made[key] = tuple(_steps(slices, kernel))
    found: tuple[Step, ...] = made[key]
    return found


def _steps(slices: Sequence[Slice], kernel: Kernel) -> Iterator[Step]:
    if kernel.varlen is not None:
        yield from map(_grouped, groups(slices))
        return
    for s in slices:
        for part in halved(s, kernel.triangle):
            for tile in tiles(part, kernel.tile):
                yield Step(Rows(((tile.q_start, tile.q_end),)), Rows(((tile.k_start, tile.k_end),)), tile.mask)


def groups(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices of one mask that share neither query rows nor keys, both ascending: the first group with room each.

    A single pair has no mask and is counted as causal, so that a document of one token joins the others.
    """
    found: list[list[Slice]] = []
    for s in sorted(s._replace(mask="causal") if s.area == 1 else s for s in slices):
        for group in found:
            last = group[-1]
            if last.mask == s.mask and last.q_end <= s.q_start and last.k_end <= s.k_start:
                group.append(s)
                break
        else:
            found.append([s])
    return found


def _grouped(group: Sequence[Slice]) -> Step:
    """An anticausal block read from its end, on both axes, is a causal one."""
    mask = group[0].mask
    rows = Rows(tuple((s.q_start, s.q_end) for s in group), mask == "anticausal")
    columns = Rows(tuple((s.k_start, s.k_end) for s in group), mask == "anticausal")
    return Step(rows, columns, mask, Segments(_bounds(rows), _bounds(columns), mask != "full"))


def _bounds(rows: Rows) -> tuple[int, ...]:
    return tuple(accumulate((stop - start for start, stop in rows.ranges), initial=0))


def halved(s: Slice, size: int | None) -> Iterator[Slice]:
    """A triangle above ``size`` rows as two triangles and the square between them, again and again.

    Cut at the multiple of ``size`` nearest to the middle: kernels like whole blocks better than equal halves.
    """
    rows = s.q_end - s.q_start
    if size is None or s.mask == "full" or rows <= size:
        yield s
        return
    middle = (rows + size) // (2 * size) * size
    q, k = s.q_start + middle, s.k_start + middle
    yield from halved(Slice(s.q_start, q, s.k_start, k, s.mask), size)
    if s.mask == "causal":
        yield Slice(q, s.q_end, s.k_start, k, "full")
    else:
        yield Slice(s.q_start, q, k, s.k_end, "full")
    yield from halved(Slice(q, s.q_end, k, s.k_end, s.mask), size)


def tiles(s: Slice, size: int | None) -> Iterator[Slice]:
    """The same work in slices of at most ``size`` rows and columns, or as it is (None)."""
    if size is None:
        yield s
        return
    for q in range(s.q_start, s.q_end, size):
        for k in range(s.k_start, s.k_end, size):
            # A triangle is square, so its diagonal runs through tiles of equal place, and one side of it is empty.
            ahead = (k - s.k_start) - (q - s.q_start)
            if (s.mask == "causal" and ahead > 0) or (s.mask == "anticausal" and ahead < 0):
                continue
            yield Slice(q, min(q + size, s.q_end), k, min(k + size, s.k_end), "full" if ahead else s.mask)
