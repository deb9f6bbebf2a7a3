"""When which block of a ring is where: pure integers, the same on every rank.

A ring is a list of steps. At a step every rank works on one rank's block: rank (a, b) of ``outer x inner`` places on
the block of rank (a - outer shift, b - inner shift). A plain ring shifts by one inner place at a time. A double ring
turns inside each inner group, while the blocks its next turns start with cross to the next group. A step that no rank
needs is left out, and the blocks jump over it; a block travels no further than the last rank that needs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Direction, Transfer

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Step(NamedTuple):
    """How far the blocks have moved, and the earlier step from whose holders they come (-1 for the first)."""

    outer: int
    inner: int
    parent: int


class Move(NamedTuple):
    """One message: the block (or the gradient of the block) of ``source``, worked on at ``step`` by its receiver."""

    direction: Direction
    peer: int
    source: int
    step: int
    crosses: bool


@dataclass(frozen=True)
class Schedule:
    """A ring over ``size`` ranks in inner groups of ``width``; ``needed[t, r]``: rank r works at step t."""

    size: int
    width: int
    steps: tuple[Step, ...]
    needed: Bools
    _moves: dict[tuple[str, int, int], tuple[Move, ...]] = field(default_factory=dict, init=False, repr=False)

    def source(self, rank: int, step: int) -> int:
        """Whose block ``rank`` works on at ``step``."""
        return self._shifted(rank, -self.steps[step].outer, -self.steps[step].inner)

    def holder(self, source: int, step: int) -> int:
        """Who works on the block of ``source`` at ``step``."""
        return self._shifted(source, self.steps[step].outer, self.steps[step].inner)

    @cached_property
    def held(self) -> Bools:
        """[steps, ranks]: whether a block is at a rank at a step, to be worked on or passed on."""
        held = self.needed.copy()
        held[0] = True
        ranks = np.arange(self.size)
        for t in range(len(self.steps) - 1, 0, -1):
            receivers = self._receivers(t, ranks)
            held[self.steps[t].parent] |= held[t, receivers]
        return held

    def moves(self, rank: int, step: int) -> tuple[Move, ...]:
        """What ``rank`` posts when it begins ``step``: its block goes on to the steps that take it from here."""
        if ("out", rank, step) not in self._moves:
            # The longer way first, since it takes longer.
            found = sorted(self._find_moves(rank, step), key=lambda move: (not move.crosses, move.step))
            self._moves["out", rank, step] = tuple(found)
        return self._moves["out", rank, step]

    def returns(self, rank: int, step: int) -> tuple[Move, ...]:
        """What ``rank`` posts when it has finished ``step``: the sum of gradients goes on to the next step, or home."""
        if ("home", rank, step) not in self._moves:
            self._moves["home", rank, step] = tuple(self._find_returns(rank, step))
        return self._moves["home", rank, step]

    def carries(self, rank: int, step: int) -> bool:
        """Whether the gradient of the block that ``rank`` works on at ``step`` passes through it."""
        first, last = self._bounds[self.source(rank, step)]
        return bool(first <= step <= last)

    def rows_sent(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Rows of blocks of ``sizes`` that all ranks send together, and rows of their gradients, as they come home."""
        ranks, rows = np.arange(self.size), np.array(sizes, dtype=np.int64)
        sent = sum(int(rows[self._sources(t, ranks)[self.held[t]]].sum()) for t in range(1, len(self.steps)))
        first, last = self._bounds.T
        return sent, int((rows * (last + 1 - first)).sum())

    @cached_property
    def _bounds(self) -> Ints:
        """[ranks, 2]: first and last step after the own one at which each source's block is needed; (1, 0): never."""
        bounds = np.tile(np.array([1, 0]), (self.size, 1))
        ranks = np.arange(self.size)
        for t in range(len(self.steps) - 1, 0, -1):
            sources = self._sources(t, ranks)[self.needed[t]]
            bounds[sources, 1] = np.maximum(bounds[sources, 1], t)
            bounds[sources, 0] = t
        return bounds

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        """For every step those that take their blocks from its holders."""
        found: list[list[int]] = [[] for _ in self.steps]
        for t, step in enumerate(self.steps):
            if step.parent >= 0:
                found[step.parent].append(t)
        return tuple(map(tuple, found))

    def _find_moves(self, rank: int, step: int) -> Iterator[Move]:
        for t in self._children[step]:
            outer, inner = self._jump(t)
            receiver, sender = self._shifted(rank, outer, inner), self._shifted(rank, -outer, -inner)
            if self.held[t, receiver]:
                yield Move("send", receiver, self.source(rank, step), t, self._crosses(rank, receiver))
            if self.held[t, rank]:
                yield Move("receive", sender, self.source(rank, t), t, self._crosses(rank, sender))

    def _find_returns(self, rank: int, step: int) -> Iterator[Move]:
        if self.carries(rank, step):
            source = self.source(rank, step)
            target = source if step == self._bounds[source, 1] else self.holder(source, step + 1)
            yield Move("send", target, source, step, self._crosses(rank, target))
        if step + 1 < len(self.steps) and self.carries(rank, step + 1):
            source = self.source(rank, step + 1)
            if self._bounds[source, 0] <= step:
                sender = self.holder(source, step)
                yield Move("receive", sender, source, step + 1, self._crosses(rank, sender))
        if step and self._bounds[rank, 1] == step:
            sender = self.holder(rank, step)
            yield Move("receive", sender, rank, step, self._crosses(rank, sender))

    def _jump(self, step: int) -> tuple[int, int]:
        here, there = self.steps[self.steps[step].parent], self.steps[step]
        return there.outer - here.outer, there.inner - here.inner

    def _receivers(self, step: int, ranks: Ints) -> Ints:
        outer, inner = self._jump(step)
        return self._shifted_all(ranks, outer, inner)

    def _sources(self, step: int, ranks: Ints) -> Ints:
        return self._shifted_all(ranks, -self.steps[step].outer, -self.steps[step].inner)

    def _shifted(self, rank: int, outer: int, inner: int) -> int:
        row, column = divmod(rank, self.width)
        return (row + outer) % (self.size // self.width) * self.width + (column + inner) % self.width

    def _shifted_all(self, ranks: Ints, outer: int, inner: int) -> Ints:
        rows, columns = ranks // self.width, ranks % self.width
        return (rows + outer) % (self.size // self.width) * self.width + (columns + inner) % self.width

    def _crosses(self, one: int, other: int) -> bool:
        return one // self.width != other // self.width


def ring_schedule(needs: Bools, width: int | None = None) -> Schedule:
    """The schedule of a ring; ``needs[r, s]``: rank r works on the block of rank s.

    Args:
        width: ranks of an inner group, for a double ring; None for a plain ring.
    """
    size = len(needs)
    width = width or size
    ranks = np.arange(size)
    whole = Schedule(size, width, tuple(_all_steps(size // width, width)), np.zeros((size, size), dtype=bool))
    needed = np.stack([needs[ranks, whole._sources(t, ranks)] for t in range(size)])
    kept = [t for t in range(size) if t == 0 or needed[t].any()]
    return Schedule(size, width, tuple(_without_gaps(whole.steps, kept)), needed[kept])


def _all_steps(rows: int, width: int) -> Iterator[Step]:
    for outer in range(rows):
        for inner in range(width):
            number = outer * width + inner
            yield Step(outer, inner, number - 1 if inner or not outer else number - width)


def _without_gaps(steps: Sequence[Step], kept: Sequence[int]) -> Iterator[Step]:
    """The kept steps, renumbered; one whose parent is gone takes its block from the parent's parent."""
    place = {t: index for index, t in enumerate(kept)}
    for t in kept:
        parent = steps[t].parent
        while parent >= 0 and parent not in place:
            parent = steps[parent].parent
        yield steps[t]._replace(parent=place.get(parent, -1))


def planned_transfers(
    group: Group, schedule: Schedule, sizes: Sequence[int], row_bytes: int, return_row_bytes: int | None = None
) -> list[Transfer]:
    """What ``circulate`` and, with ``return_row_bytes``, ``Homeward`` will post on this rank, in order.

    Args:
        sizes: rows of every rank's block.
    """
    planned = []
    for step in range(len(schedule.steps)):
        for move in schedule.moves(group.rank, step):
            kind = "ring-crossing" if move.crosses else "ring"
            planned.append(Transfer(kind, move.direction, group.ranks[move.peer], sizes[move.source] * row_bytes))
        if return_row_bytes is not None:
            for move in schedule.returns(group.rank, step):
                size = sizes[move.source] * return_row_bytes
                planned.append(Transfer("ring-return", move.direction, group.ranks[move.peer], size))
    return planned
