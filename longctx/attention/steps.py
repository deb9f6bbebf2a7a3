"""Slices as calls of a kernel: cut into parts, or grouped for kernels that take blocks of many lengths in one call.

Pure integers, found once per hop and kept with its slices; only the tables that a device needs are tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from longctx.attention.cutting import cuts
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

    @property
    def views(self) -> bool:
        """Whether :meth:`of` returns a view."""
        return self.span is not None

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
class Blocks:
    """``count`` blocks of ``rows`` rows at equal distances, as views [count, rows, ...]; one block has no batch."""

    start: int
    rows: int
    count: int
    stride: int

    views: ClassVar[bool] = True

    @property
    def ranges(self) -> Ranges:
        starts = range(self.start, self.start + self.count * self.stride, self.stride) if self.stride else [self.start]
        return tuple((start, start + self.rows) for start in starts)

    @cached_property
    def host(self) -> slice | npt.NDArray[np.int64]:
        """For arrays on the host."""
        if self.count == 1:
            return slice(self.start, self.start + self.rows)
        return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in self.ranges])

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.count == 1:
            return tensor.narrow(0, self.start, self.rows)
        row = tensor.stride(0)
        return tensor.as_strided(
            (self.count, self.rows, *tensor.shape[1:]), (self.stride * row, *tensor.stride()),
            tensor.storage_offset() + self.start * row,
        )  # fmt: skip

    def assign_(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        self.of(tensor).copy_(rows)

    def add_(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        self.of(tensor).add_(rows)


@dataclass(frozen=True)
class Step:
    """One call: ``segments`` for a kernel that takes blocks of many lengths, None for dense blocks of ``mask``."""

    rows: Rows | Blocks
    columns: Rows | Blocks
    mask: Mask
    segments: Segments | None = None


def steps_of(slices: Sequence[Slice], kernel: Kernel, backward: bool = False) -> tuple[Step, ...]:
    """The calls of ``kernel`` that do the work of ``slices`` in a forward or backward, each query-key pair once."""
    made = slices.made if isinstance(slices, Slices) else {}
    tile = kernel.backward_tile if backward and kernel.backward_tile else kernel.tile
    key = ("steps", tile, kernel.strip, kernel.varlen is not None)
    if key not in made:
        made[key] = tuple(_steps(slices, kernel, tile))
    found: tuple[Step, ...] = made[key]
    return found


def _steps(slices: Sequence[Slice], kernel: Kernel, tile: tuple[int, int] | None) -> Iterator[Step]:
    if kernel.varlen is not None:
        yield from map(_grouped, groups(slices))
        return
    for s in slices:
        for cut in cuts(s, kernel.strip, tile):
            rows = Blocks(cut.q, cut.rows, cut.number, cut.stride)
            yield Step(rows, Blocks(cut.k, cut.columns, cut.number, cut.stride), cut.mask)


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
