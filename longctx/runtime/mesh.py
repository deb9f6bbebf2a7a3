"""The mesh of ranks, built once per run: data x sequence.

World rank = data rank * sequence degree + sequence rank, so the ranks of one sequence are neighbours and share a node
whenever the degree fits in one.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from longctx.config.check import fitting_degrees
from longctx.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """Some ranks of the world in a fixed order, and this process's place among them.

    ``handle`` and ``returning`` are two communicators over the same ranks: what flows back (gradients) must not queue
    behind what flows forward. Both are None for a group that never communicates: one rank, or the data ranks.
    """

    rank: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None = None
    returning: dist.ProcessGroup | None = None

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
        numbers = torch.zeros(self.world.size, dtype=torch.int64, device=self.device)
        numbers[self.world.rank] = number
        return [int(n) for n in self.all_reduce(numbers).tolist()]

    def barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier(group=self.world.handle)


def alone(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of a single process that never communicates."""
    one = Group(0, (0,))
    return Mesh(one, one, one, torch.device(device))


def build_mesh(sequence_degree: int, device: torch.device, timeout_s: int = 600) -> Mesh:
    """Build the groups of an initialised process world; collective over the world.

    Raises:
        ConfigError: ``sequence_degree`` does not divide the number of processes.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % sequence_degree:
        raise ConfigError(
            f"sequence.degree = {sequence_degree} does not divide the world of {world_size} processes; "
            f"choose one of {fitting_degrees(world_size)} or start another number of processes"
        )
    world = Group(rank, tuple(range(world_size)), dist.group.WORLD, dist.group.WORLD)
    rows = [tuple(range(i, i + sequence_degree)) for i in range(0, world_size, sequence_degree)]
    columns = [tuple(range(i, world_size, sequence_degree)) for i in range(sequence_degree)]
    limit = timedelta(seconds=timeout_s)
    # Data ranks never talk among themselves: gradients and counters are summed over the world.
    data = Group(rank // sequence_degree, columns[rank % sequence_degree])
    return Mesh(world, data, _join(rows, rank, limit), device)


def _join(groups: list[tuple[int, ...]], rank: int, limit: timedelta) -> Group:
    """Create every group on every rank, in one order (a collective), and return the one ``rank`` is in."""
    mine = Group(0, (rank,))
    for ranks in groups:
        if len(ranks) == 1:
            continue
        forward = dist.new_group(list(ranks), timeout=limit)
        returning = dist.new_group(list(ranks), timeout=limit)
        if rank in ranks:
            mine = Group(ranks.index(rank), ranks, forward, returning)
    return mine
