"""gather: every rank's rows on every rank in global order, and the sum of such rows back to their owners."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.layout import Layout


def gather_shards(x_BT: torch.Tensor, sizes: Sequence[int], group: Group) -> list[torch.Tensor]:
    """Shards [B, sizes[p], ...] of all ranks p, to look at a whole sequence; not differentiable, used by no layer."""
    if group.size == 1:
        return [x_BT.detach()]
    shape = list(x_BT.shape)
    shape[1] = max(sizes)
    padded = x_BT.new_zeros(shape)
    padded[:, : x_BT.shape[1]] = x_BT.detach()
    gathered = [torch.empty_like(padded) for _ in range(group.size)]
    dist.all_gather(gathered, padded, group=group.handle)
    return [part[:, :size] for part, size in zip(gathered, sizes, strict=True)]


@dataclass(frozen=True)
class GatherRows:
    """Flattened batch x token rows of a layout, gathered over a group.

    Shards are padded to the longest on the wire, since gathering is a collective of equal parts.
    """

    group: Group
    batch: int
    layout: Layout
    ledger: Ledger | None = None
    _tables: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Rows of the longest shard."""
        return self.batch * max(self.layout.sizes)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[B*T, ...] of this rank to [B*S, ...] in global order."""
        padded = own.contiguous()
        if own.shape[0] < self.rows:
            padded = own.new_zeros(self.rows, *own.shape[1:])
            padded[: own.shape[0]] = own
        gathered = padded
        if self.group.size > 1:
            gathered = own.new_empty(self.group.size * self.rows, *own.shape[1:])
            self._record("gather", padded)
            collective("all_gather")(gathered, padded, group=self.group.handle)
        return gathered.index_select(0, self._places_on(own.device))

    def scatter_sum(self, whole: torch.Tensor) -> torch.Tensor:
        """[B*S, ...] of every rank, summed over the ranks in its dtype, to this rank's [B*T, ...]."""
        parts = whole.new_zeros(self.group.size * self.rows, *whole.shape[1:])
        parts.index_copy_(0, self._places_on(whole.device), whole)
        own = parts
        if self.group.size > 1:
            own = whole.new_empty(self.rows, *whole.shape[1:])
            self._record("reduce-scatter", own)
            collective("reduce_scatter")(own, parts, group=self.group.handle)
        return own[: self.batch * self.layout.sizes[self.group.rank]]

    def planned(self, row_bytes: int, return_row_bytes: int) -> list[Transfer]:
        """What one :meth:`gather` and one :meth:`scatter_sum` post on this rank, in order."""
        if self.group.size == 1:
            return []
        there = to_all(self.group, "gather", self.rows * row_bytes)
        return there + to_all(self.group, "reduce-scatter", self.rows * return_row_bytes)

    def _places_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._tables:
            self._tables[device] = torch.from_numpy(self._places).to(device)
        return self._tables[device]

    @property
    def _places(self) -> npt.NDArray[np.int64]:
        """Where row (b, s) lies among the padded shards one after the other, [B*S]."""
        places = np.empty((self.batch, self.layout.length), dtype=np.int64)
        for rank, size in enumerate(self.layout.sizes):
            rows = np.arange(self.batch * size).reshape(self.batch, size)
            places[:, self.layout.indices(rank)] = rank * self.rows + rows
        return places.reshape(-1)

    def _record(self, kind: str, part: torch.Tensor) -> None:
        if self.ledger is not None:
            self.ledger.transfers += to_all(self.group, kind, part.numel() * part.element_size())


def to_all(group: Group, kind: str, size: int) -> list[Transfer]:
    """``size`` bytes to and from every other rank of the group."""
    peers = [rank for place, rank in enumerate(group.ranks) if place != group.rank]
    return [Transfer(kind, "send", p, size) for p in peers] + [Transfer(kind, "receive", p, size) for p in peers]


def collective(name: str) -> Callable[..., Any]:
    """The form with one tensor in and one out, which torch 2.13 renamed."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    function: Callable[..., Any] = getattr(dist, f"{name}_single", None) or getattr(dist, older)
    return function
