"""ring: blocks travel around the ranks, the next one in flight while the current one is worked on.

The schedule comes from the plan: a block stops at the last rank that needs it. What a rank adds to a foreign block
(gradients) travels the same way on a second communicator and goes straight home from the last stop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Direction, Ledger, Transfer


@dataclass(frozen=True)
class Schedule:
    """Who sends which source's block when. ``last_hop[s]`` is the last hop at which block s is needed; 0: it stays."""

    last_hop: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.last_hop)

    @property
    def hops(self) -> int:
        return max(self.last_hop)

    def source(self, rank: int, hop: int) -> int:
        """Whose block ``rank`` holds at ``hop``."""
        return (rank - hop) % self.size

    def holds(self, rank: int, hop: int) -> bool:
        """Whether any block is at ``rank`` at ``hop``."""
        return hop <= self.last_hop[self.source(rank, hop)]

    def forwards(self, rank: int, hop: int) -> bool:
        """Whether ``rank`` passes the block it holds at ``hop`` on to the next rank."""
        return hop < self.last_hop[self.source(rank, hop)]


def circulate(
    block: torch.Tensor, sizes: Sequence[int], schedule: Schedule, group: Group, ledger: Ledger | None = None
) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """Yield ``(hop, source, block)`` for every hop, this rank's own block (hop 0) first; None where no block arrives.

    ``block`` [rows, ...]: this rank's; ``sizes[s]``: rows of rank s's. The transfer of the next block is posted before
    the current one is yielded.
    """
    rank, size = group.rank, group.size
    right, left = (rank + 1) % size, (rank - 1) % size
    current: torch.Tensor | None = block.contiguous()
    for hop in range(schedule.hops + 1):
        works: list[dist.Work] = []
        following: torch.Tensor | None = None
        operations = []
        if schedule.forwards(rank, hop):
            assert current is not None
            operations.append(_post("ring", "send", current, right, group, ledger, group.handle))
        if schedule.forwards(left, hop):
            following = block.new_empty(sizes[schedule.source(rank, hop + 1)], *block.shape[1:])
            operations.append(_post("ring", "receive", following, left, group, ledger, group.handle))
        if operations:
            works = dist.batch_isend_irecv(operations)
        yield hop, schedule.source(rank, hop), current
        for work in works:
            work.wait()
        current = following


class Homeward:
    """Sums what each rank adds to a block along the ring and brings the sum back to the block's owner.

    ``like`` tells dtype, device and all dimensions but the first; its rows do not matter. Call :meth:`add` at every
    hop after 0, in order, on every rank; then :meth:`arrived`.
    """

    def __init__(
        self, like: torch.Tensor, sizes: Sequence[int], schedule: Schedule, group: Group, ledger: Ledger | None = None
    ) -> None:
        self._like, self._sizes, self._schedule, self._group, self._ledger = like, sizes, schedule, group, ledger
        self._works: list[dist.Work] = []
        self._in_flight: list[torch.Tensor] = []
        self._incoming: torch.Tensor | None = None
        self._returned: torch.Tensor | None = None

    def add(self, hop: int, addend: torch.Tensor | None) -> None:
        """Add this rank's contribution at ``hop`` (None if no block is here) and pass the sum on."""
        rank, size, schedule = self._group.rank, self._group.size, self._schedule
        right, left = (rank + 1) % size, (rank - 1) % size
        self._finish()
        if self._incoming is not None:
            assert addend is not None
            addend = addend.add_(self._incoming)
            self._incoming = None
        operations = []
        if addend is not None:
            target = right if schedule.forwards(rank, hop) else schedule.source(rank, hop)
            operations.append(self._post("send", addend, target))
        if schedule.forwards(left, hop):
            self._incoming = self._room(schedule.source(left, hop))
            operations.append(self._post("receive", self._incoming, left))
        if schedule.last_hop[rank] == hop:
            self._returned = self._room(rank)
            operations.append(self._post("receive", self._returned, (rank + hop) % size))
        if operations:
            self._works = dist.batch_isend_irecv(operations)
            self._in_flight = [operation.tensor for operation in operations]

    def arrived(self) -> torch.Tensor | None:
        """The sum of all other ranks' contributions to this rank's block, or None if nobody else needed it."""
        self._finish()
        return self._returned

    def _finish(self) -> None:
        # A gloo work must be waited for exactly once: a second wait expects a second message.
        for work in self._works:
            work.wait()
        self._works, self._in_flight = [], []

    def _room(self, source: int) -> torch.Tensor:
        return self._like.new_empty(self._sizes[source], *self._like.shape[1:])

    def _post(self, direction: Direction, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return _post("ring-return", direction, tensor, peer, self._group, self._ledger, self._group.returning)


def planned_transfers(
    rank: int, schedule: Schedule, sizes: Sequence[int], row_bytes: int, return_row_bytes: int | None = None
) -> list[Transfer]:
    """What :func:`circulate` and, with ``return_row_bytes``, :class:`Homeward` will post on ``rank``, in order."""
    size = schedule.size
    right, left = (rank + 1) % size, (rank - 1) % size
    planned: list[Transfer] = []
    for hop in range(schedule.hops + 1):
        if schedule.forwards(rank, hop):
            planned.append(Transfer("ring", "send", right, sizes[schedule.source(rank, hop)] * row_bytes))
        if schedule.forwards(left, hop):
            planned.append(Transfer("ring", "receive", left, sizes[schedule.source(left, hop)] * row_bytes))
        if return_row_bytes is None or hop == 0:
            continue
        source = schedule.source(rank, hop)
        if schedule.holds(rank, hop):
            target = right if schedule.forwards(rank, hop) else source
            planned.append(Transfer("ring-return", "send", target, sizes[source] * return_row_bytes))
        if schedule.forwards(left, hop):
            source = schedule.source(left, hop)
            planned.append(Transfer("ring-return", "receive", left, sizes[source] * return_row_bytes))
        if schedule.last_hop[rank] == hop:
            planned.append(Transfer("ring-return", "receive", (rank + hop) % size, sizes[rank] * return_row_bytes))
    return planned


def _post(
    kind: str, direction: Direction, tensor: torch.Tensor, peer: int, group: Group, ledger: Ledger | None,
    handle: dist.ProcessGroup | None,
) -> dist.P2POp:  # fmt: skip
    if ledger is not None:
        ledger.transfers.append(Transfer(kind, direction, peer, tensor.numel() * tensor.element_size()))
    operation = dist.isend if direction == "send" else dist.irecv
    return dist.P2POp(operation, tensor, group.ranks[peer], group=handle)
