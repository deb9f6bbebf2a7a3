"""What attention sends and receives, from the plan alone: no tensors, no communication.

Legend: H query heads, K kv heads, E head dim.
"""

from dataclasses import dataclass

import torch

from longctx.attention.schemes import gathered_rows, inner_and_outer, joined_plan, schedules_of, transposition
from longctx.attention.travel import Schedules, queries_travel, query_bytes
from longctx.attention.ulysses import HeadShare
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.schedule import planned_transfers
from longctx.sequence.collectives.transpose import planned_exchange
from longctx.sequence.context import SequenceContext


@dataclass(frozen=True)
class Call:
    """Heads, head size, dtype and mask of one attention call."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    causal: bool = True
    window: int | None = None

    @property
    def wide(self) -> int:
        """Bytes of an accumulator."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def kv_gradient_bytes(self) -> int:
        """Bytes of their gradients, which are summed wide."""
        return 2 * self.kv_heads * self.head_dim * self.wide


def planned_traffic(context: SequenceContext, call: Call) -> list[Transfer]:
    """The transfers of one forward and one backward of attention on this rank, in order."""
    forward, backward = planned_passes(context, call)
    return forward + backward


def planned_passes(context: SequenceContext, call: Call) -> tuple[list[Transfer], list[Transfer]]:
    """The transfers of a forward, and of a backward."""
    if context.degree == 1:
        return [], []
    if context.scheme == "allgather":
        rows = gathered_rows(context)
        both = rows.planned(call.kv_bytes, call.kv_gradient_bytes)
        return both[: len(both) // 2], both[len(both) // 2 :]
    if context.scheme in ("ulysses", "hybrid"):
        return _exchanged(context, call)
    width = inner_and_outer(context)[0].size if context.scheme == "double_ring" else None
    plan = context.plan(call.causal, call.window)
    return planned_ring(schedules_of(context, plan, width), context.group, call)


def _exchanged(context: SequenceContext, call: Call) -> tuple[list[Transfer], list[Transfer]]:
    inner, outer = inner_and_outer(context)
    share = HeadShare.of(call.heads, call.kv_heads, inner.size)
    exchange = transposition(context, inner, share)
    head_bytes = call.head_dim * call.dtype.itemsize
    everything, output = (0, 1, 2), (0,)

    def moved(numbers: tuple[int, ...], to_heads: bool) -> list[Transfer]:
        return planned_exchange(exchange, numbers, head_bytes, to_heads=to_heads)

    ring: tuple[list[Transfer], list[Transfer]] = [], []
    first, last = share.queries[inner.rank]
    if first < last:
        plan = joined_plan(context, inner.size, call.causal, call.window)[1]
        own = Call(last - first, len(share.index[inner.rank]), call.head_dim, call.dtype, call.causal, call.window)
        ring = planned_ring(schedules_of(context, plan, None), outer, own)
    return (
        moved(everything, True) + ring[0] + moved(output, False),
        moved(output, True) + ring[1] + moved(everything, False),
    )


def planned_ring(schedules: Schedules, group: Group, call: Call) -> tuple[list[Transfer], list[Transfer]]:
    """The transfers of a ring's forward, and of its backward."""
    plan = schedules.plan
    key_rows = plan.rows("keys")
    there = list(planned_transfers(group, schedules.there, key_rows, call.kv_bytes))
    if queries_travel(schedules, call.heads, call.kv_heads, call.head_dim, call.dtype):
        row, home = query_bytes(call.heads, call.head_dim, call.dtype), call.heads * call.head_dim * call.wide
        return there, planned_transfers(group, schedules.back, plan.rows("queries"), row, home)
    return there, planned_transfers(group, schedules.there, key_rows, call.kv_bytes, call.kv_gradient_bytes)
