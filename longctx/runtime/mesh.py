"""The mesh of ranks, built once per run: data x outer x inner.

World rank = data rank * sequence degree + sequence rank, and sequence rank = outer rank * inner size + inner rank: the
ranks of one sequence are neighbours and share a node whenever the degree fits in one, and inner groups always do.
"""

import math
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from longctx.config.check import fitting_degrees
from longctx.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Some ranks of the world in a fixed order, and this process's place among them.

    ``handle``, ``returning`` and ``crossing`` are communicators over the same ranks: what flows back (gradients) must
    not queue behind what flows forward, nor what stays inside a node behind what leaves it. All are None for a group
    that never communicates: one rank, or the data ranks.

    A sequence group may be two-dimensional: ``inner`` are the ranks of this rank's node (or another set of neighbours),
    ``outer`` those with the same place in the other inner groups.
    """

    rank: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None = None
    returning: dist.ProcessGroup | None = None
    crossing: dist.ProcessGroup | None = None
    inner: "Group | None" = None
    outer: "Group | None" = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """All groups this rank belongs to."""

    world: Group
    data: Group
    sequence: Group
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the run writes once."""
        return self.world.rank == 0

    def all_reduce(self, tensor: torch.Tensor, op: "dist.ReduceOp.RedOpType" = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce ``tensor`` over the whole world in place (counters and flags, never activations)."""
        if self.world.size > 1:
            dist.all_reduce(tensor, op=op, group=self.world.handle)
        return tensor

    def gather(self, number: int) -> list[int]:
        """The number of every rank of the world, in rank order."""
        return gather_numbers(number, self.world, self.device)

    def barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier(group=self.world.handle)


def gather_numbers(number: int, group: Group, device: torch.device) -> list[int]:
    """The number of every rank of a group, in rank order; collective."""
    numbers = torch.zeros(group.size, dtype=torch.int64, device=device)
    numbers[group.rank] = number
    if group.size > 1:
        dist.all_reduce(numbers, group=group.handle)
    return [int(n) for n in numbers.tolist()]


def alone(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of a single process that never communicates."""
    one = Group(0, (0,))
    return Mesh(one, one, one, torch.device(device))


def default_inner(sequence_degree: int, local_world: int) -> int:
    """Largest inner size whose groups never leave a node of ``local_world`` ranks."""
    return math.gcd(sequence_degree, local_world)


def folded(rank: int, size: int, inner: int) -> Group:
    """A two-dimensional group of ranks 0 to ``size`` - 1 without communicators, to plan with."""
    if size % inner:
        raise ConfigError(f"inner groups of {inner} ranks do not divide a sequence over {size} ranks")
    row, column = divmod(rank, inner)
    inside, across = tuple(range(row * inner, (row + 1) * inner)), tuple(range(column, size, inner))
    return Group(rank, tuple(range(size)), inner=Group(column, inside), outer=Group(row, across))


def build_mesh(sequence_degree: int, device: torch.device, timeout_s: int = 600, inner: int | None = None) -> Mesh:
    """Build the groups of an initialised process world; collective over the world.

    Args:
        inner: ranks of one inner group; None leaves the sequence groups one-dimensional.

    Raises:
        ConfigError: ``sequence_degree`` does not divide the number of processes, or ``inner`` the degree.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % sequence_degree:
        raise ConfigError(
            f"sequence.degree = {sequence_degree} does not divide the world of {world_size} processes; "
            f"choose one of {fitting_degrees(world_size)} or start another number of processes"
        )
    if inner is not None and sequence_degree % inner:
        raise ConfigError(
            f"sequence.inner = {inner} does not divide sequence.degree = {sequence_degree}; "
            f"choose one of {fitting_degrees(sequence_degree)}"
        )
    world = Group(rank, tuple(range(world_size)), dist.group.WORLD, dist.group.WORLD)
    limit = timedelta(seconds=timeout_s)
    firsts = range(0, world_size, sequence_degree)
    sequence = _join([tuple(range(i, i + sequence_degree)) for i in firsts], rank, limit, crossing=inner is not None)
    if inner is not None:
        sequence = _fold(sequence, firsts, sequence_degree, inner, rank, limit)
    # Data ranks never talk among themselves: gradients and counters are summed over the world.
    data = Group(rank // sequence_degree, tuple(range(rank % sequence_degree, world_size, sequence_degree)))
    return Mesh(world, data, sequence, device)


def _fold(sequence: Group, firsts: range, degree: int, inner: int, rank: int, limit: timedelta) -> Group:
    """The sequence group with its inner and outer groups, which are the group itself where they span it."""
    one = Group(0, (rank,))
    if inner == 1:
        return replace(sequence, inner=one, outer=sequence)
    if inner == degree:
        return replace(sequence, inner=sequence, outer=one)
    inside = [tuple(range(i, i + inner)) for first in firsts for i in range(first, first + degree, inner)]
    across = [tuple(range(first + i, first + degree, inner)) for first in firsts for i in range(inner)]
    return replace(sequence, inner=_join(inside, rank, limit), outer=_join(across, rank, limit))


def _join(groups: list[tuple[int, ...]], rank: int, limit: timedelta, crossing: bool = False) -> Group:
    """Create every group on every rank, in one order (a collective), and return the one ``rank`` is in."""
    mine = Group(0, (rank,))
    for ranks in groups:
        if len(ranks) == 1:
            continue
        handles = [dist.new_group(list(ranks), timeout=limit) for _ in range(3 if crossing else 2)]
        if rank in ranks:
            mine = Group(ranks.index(rank), ranks, *handles)
    return mine
