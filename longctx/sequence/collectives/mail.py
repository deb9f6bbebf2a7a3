"""Messages between two ranks of a group: each is posted at once, and waited for exactly once (gloo wants no more)."""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Direction, Ledger, Transfer


class Arriving(NamedTuple):
    """A message under way."""

    work: dist.Work
    tensor: Tensor

    def land(self) -> Tensor:
        """Wait for it."""
        self.work.wait()
        return self.tensor


class Mail:
    """The messages of one pass, of transfers called ``kind``. Peers are places in the group."""

    def __init__(self, group: Group, handle: dist.ProcessGroup | None, kind: str, ledger: Ledger | None) -> None:
        self._group, self._handle, self._kind, self._ledger = group, handle, kind, ledger
        self._sent: list[Arriving] = []

    def receive(self, peer: int, like: Tensor) -> Arriving:
        """Post the receive of a message with the shape and dtype of ``like``."""
        return self._post("receive", peer, torch.empty_like(like, memory_format=torch.contiguous_format))

    def send(self, peer: int, state: Tensor) -> None:
        """Post a message; it is kept until :meth:`close`."""
        self._sent.append(self._post("send", peer, state.contiguous()))

    def close(self) -> None:
        """Wait for what was sent."""
        while self._sent:
            self._sent.pop(0).land()

    def _post(self, direction: Direction, peer: int, tensor: Tensor) -> Arriving:
        rank = self._group.ranks[peer]
        if self._ledger is not None:
            size = tensor.numel() * tensor.element_size()
            self._ledger.transfers.append(Transfer(self._kind, direction, rank, size))
        post = partial(dist.isend, dst=rank) if direction == "send" else partial(dist.irecv, src=rank)
        work = post(tensor, group=self._handle)
        assert work is not None
        return Arriving(work, tensor)
