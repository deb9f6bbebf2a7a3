"""reduce: the sum or maximum of a tensor of fixed size over all ranks, on every rank; inside nodes first, then across.

A rank of a group of P that reduces n bytes sends and receives ``2 (P - 1) / P n`` bytes, what a ring or a tree moves
that cuts the tensor into P parts (Patarasuk and Yuan 2009); so says the ledger. A group with inner groups reduces over
these and then over the ranks of equal place in them, so that only ``2 (outer - 1) / outer n`` leave a node.
"""

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer


def reduce_(tensor: Tensor, op: Literal["sum", "max"], group: Group, ledger: Ledger | None = None) -> Tensor:
    """``tensor`` of every rank reduced in place, with the same bits everywhere. Not differentiable."""
    kinds = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
    for part in _levels(group):
        if ledger is not None:
            ledger.transfers += _transfers(part, tensor.numel() * tensor.element_size())
        dist.all_reduce(tensor, op=kinds[op], group=part.handle)
    return tensor


def planned_reduce(group: Group, size: int) -> list[Transfer]:
    """What reducing ``size`` bytes moves to and from this rank."""
    return [transfer for part in _levels(group) for transfer in _transfers(part, size)]


def reduced_bytes(group: Group, size: int) -> float:
    """Bytes that this rank sends to reduce ``size`` bytes."""
    return sum(2 * (part.size - 1) / part.size * size for part in _levels(group))


def _levels(group: Group) -> list[Group]:
    """The groups that are reduced over, one after the other."""
    if group.inner is None or group.outer is None:
        return [group] if group.size > 1 else []
    return [part for part in (group.inner, group.outer) if part.size > 1]


def _transfers(group: Group, size: int) -> list[Transfer]:
    """Two parts of ``size / P`` to and from every other rank; the first peers take what does not divide."""
    found = []
    others = [rank for place, rank in enumerate(group.ranks) if place != group.rank]
    total = 2 * (group.size - 1) * size // group.size
    for number, peer in enumerate(others):
        part = total * (number + 1) // len(others) - total * number // len(others)
        found += [Transfer("reduce", "send", peer, part), Transfer("reduce", "receive", peer, part)]
    return found
