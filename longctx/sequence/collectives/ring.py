"""ring: blocks travel around the ranks, the next one in flight while the current one is worked on.

Who works on whose block when is a :class:`Schedule`. What a rank adds to a foreign block (gradients) travels from step
to step on a second communicator and goes straight home from the last one that adds to it.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.schedule import Move, Schedule


class _Flight:
    """Messages that were posted together and are waited for together."""

    def __init__(self) -> None:
        self._works: list[dist.Work] = []
        self._tensors: list[torch.Tensor] = []
        self.arriving: torch.Tensor | None = None

    def post(self, operations: list[dist.P2POp]) -> None:
        self._works += dist.batch_isend_irecv(operations)
        self._tensors += [operation.tensor for operation in operations]

    def land(self) -> torch.Tensor | None:
        """Wait, let go of what was sent, and return what was received."""
        # A gloo work must be waited for exactly once: a second wait expects a second message.
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []
        return self.arriving


def circulate(
    block: torch.Tensor, sizes: Sequence[int], schedule: Schedule, group: Group, ledger: Ledger | None = None
) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """Yield ``(step, source, block)`` for every step, this rank's own block first; None where no block is needed.

    ``block`` [rows, ...]: this rank's; ``sizes[s]``: rows of rank s's. What leaves for later steps is posted before a
    block is yielded.
    """
    flights: dict[int, _Flight] = {}
    current: torch.Tensor | None = block
    if schedule.moves(group.rank, 0):
        current = block.contiguous()
    for step in range(len(schedule.steps)):
        if step:
            current = flights.pop(step).land() if step in flights else None
        operations: dict[int, list[dist.P2POp]] = {}
        for move in schedule.moves(group.rank, step):
            flight = flights.setdefault(move.step, _Flight())
            operation = _operation(move, current, block, sizes, flight, group)
            operations.setdefault(move.step, []).append(operation)
            _record(ledger, "ring-crossing" if move.crosses else "ring", move, operation.tensor, group)
        for target, posted in operations.items():
            flights[target].post(posted)
        yield step, schedule.source(group.rank, step), current if schedule.held[step, group.rank] else None


def _operation(
    move: Move, current: torch.Tensor | None, like: torch.Tensor, sizes: Sequence[int], flight: _Flight, group: Group
) -> dist.P2POp:
    handle = group.crossing if move.crosses else group.handle
    if move.direction == "receive":
        flight.arriving = like.new_empty(sizes[move.source], *like.shape[1:])
        return dist.P2POp(dist.irecv, flight.arriving, group.ranks[move.peer], group=handle)
    assert current is not None
    return dist.P2POp(dist.isend, current, group.ranks[move.peer], group=handle)


class Homeward:
    """Sums what each rank adds to a block along the ring and brings the sum back to the block's owner.

    ``like`` tells dtype, device and all dimensions but the first; its rows do not matter. Call :meth:`add` at every
    step after the first, in order, on every rank; then :meth:`arrived`.
    """

    def __init__(
        self, like: torch.Tensor, sizes: Sequence[int], schedule: Schedule, group: Group, ledger: Ledger | None = None
    ) -> None:
        self._like, self._sizes, self._schedule, self._group, self._ledger = like, sizes, schedule, group, ledger
        self._flight = _Flight()
        self._returned: torch.Tensor | None = None

    def add(self, step: int, addend: torch.Tensor | None) -> None:
        """Add this rank's contribution at ``step`` (None if it has none) and pass the sum on."""
        incoming = self._flight.land()
        if incoming is not None:
            addend = incoming if addend is None else addend.add_(incoming)
        self._flight = flight = _Flight()
        operations = []
        for move in self._schedule.returns(self._group.rank, step):
            if move.direction == "send":
                assert addend is not None
                tensor = addend
            else:
                tensor = self._like.new_empty(self._sizes[move.source], *self._like.shape[1:])
                if move.step == step:
                    self._returned = tensor
                else:
                    flight.arriving = tensor
            _record(self._ledger, "ring-return", move, tensor, self._group)
            call = dist.isend if move.direction == "send" else dist.irecv
            operations.append(dist.P2POp(call, tensor, self._group.ranks[move.peer], group=self._group.returning))
        if operations:
            flight.post(operations)

    def arrived(self) -> torch.Tensor | None:
        """The sum of all other ranks' contributions to this rank's block, or None if nobody else needed it."""
        self._flight.land()
        return self._returned


def _record(ledger: Ledger | None, kind: str, move: Move, tensor: torch.Tensor, group: Group) -> None:
    if ledger is not None:
        size = tensor.numel() * tensor.element_size()
        ledger.transfers.append(Transfer(kind, move.direction, group.ranks[move.peer], size))
