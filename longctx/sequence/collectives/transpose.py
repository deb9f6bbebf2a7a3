"""transpose: from all heads of this rank's tokens to all tokens of this rank's heads, and back.

Any token counts and any ranges of heads, also overlapping ones (a kv head that several ranks need) and empty ones.

Legend: B batch, T this rank's tokens, U tokens of all ranks, H heads, E head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer

Heads = tuple[tuple[int, int], ...]
"""For every rank the range of heads it gets."""


@dataclass(frozen=True)
class Transposition:
    """Tokens of every rank of a group and, for every tensor that moves, the heads of every rank."""

    group: Group
    batch: int
    tokens: tuple[int, ...]
    heads: tuple[Heads, ...]
    ledger: Ledger | None = None

    def to_heads(self, *tensors_BTHE: Tensor) -> tuple[Tensor, ...]:
        """Each [B, T, H, E] as [B, U, own heads, E], tokens rank after rank; one message per peer for all of them."""
        if self.group.size == 1:
            return tensors_BTHE
        moved: tuple[Tensor, ...] = _ToHeads.apply(self, *tensors_BTHE)  # type: ignore[no-untyped-call]
        return moved

    def to_tokens(self, x_BUHE: Tensor, number: int = 0) -> Tensor:
        """The way back for tensor ``number``, whose ranges of heads must not overlap: [B, T, all heads, E]."""
        if self.group.size == 1:
            return x_BUHE
        moved: Tensor = _ToTokens.apply(self, number, x_BUHE)  # type: ignore[no-untyped-call]
        return moved


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Transposition, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.counts = plan, [t.shape[2] for t in tensors]
        return tuple(_scatter_heads(plan, tensors, range(len(tensors))))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gather_heads(ctx.plan, grads, range(len(grads)), ctx.counts)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Transposition, number: int, x: Tensor) -> Tensor:
        ctx.plan, ctx.number = plan, number
        return _gather_heads(plan, (x,), (number,), (_total(plan.heads[number]),))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _scatter_heads(ctx.plan, (grad,), (ctx.number,))[0]


def planned_exchange(plan: Transposition, numbers: Sequence[int], head_bytes: int, *, to_heads: bool) -> list[Transfer]:
    """What one direction of a transposition of tensors ``numbers`` posts on this rank, in order.

    Args:
        head_bytes: bytes of one head of one token.
    """
    rank = plan.group.rank
    leaving = [plan.batch * plan.tokens[rank] * _width(plan, numbers, p) for p in range(plan.group.size)]
    arriving = [plan.batch * plan.tokens[p] * _width(plan, numbers, rank) for p in range(plan.group.size)]
    sent, received = (leaving, arriving) if to_heads else (arriving, leaving)
    return _transfers(plan.group, [n * head_bytes for n in sent], [n * head_bytes for n in received])


def _scatter_heads(plan: Transposition, tensors: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
    rank, size, (batch, _, _, head_dim) = plan.group.rank, plan.group.size, tensors[0].shape
    pieces = [
        [t[:, :, slice(*plan.heads[n][peer])] for t, n in zip(tensors, numbers, strict=True)] for peer in range(size)
    ]
    shapes = [[(batch, plan.tokens[p], _span(plan.heads[n][rank]), head_dim) for n in numbers] for p in range(size)]
    received = _exchange(plan, pieces, shapes, tensors[0])
    return [torch.cat([received[p][i] for p in range(size)], dim=1) for i in range(len(numbers))]


def _gather_heads(
    plan: Transposition, tensors: Sequence[Tensor], numbers: Sequence[int], counts: Sequence[int]
) -> list[Tensor]:
    """Sums what several ranks return for one head, in fp32 (fp64 for fp64)."""
    rank, size, (batch, _, _, head_dim) = plan.group.rank, plan.group.size, tensors[0].shape
    parts = [torch.split(t, list(plan.tokens), dim=1) for t in tensors]
    pieces = [[part[peer] for part in parts] for peer in range(size)]
    shapes = [[(batch, plan.tokens[rank], _span(plan.heads[n][p]), head_dim) for n in numbers] for p in range(size)]
    received = _exchange(plan, pieces, shapes, tensors[0])
    gathered = []
    for i, (n, count) in enumerate(zip(numbers, counts, strict=True)):
        shares = [received[p][i] for p in range(size)]
        if _total(plan.heads[n]) == count:
            gathered.append(torch.cat(shares, dim=2))
            continue
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        total = tensors[0].new_zeros((batch, plan.tokens[rank], count, head_dim), dtype=wide)
        for p, share in enumerate(shares):
            total[:, :, slice(*plan.heads[n][p])] += share
        gathered.append(total.to(tensors[0].dtype))
    return gathered


def _exchange(
    plan: Transposition, pieces: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], like: Tensor
) -> list[list[Tensor]]:
    """``pieces[p]`` go to rank p of the group; tensors of ``shapes[p]`` come from it."""
    sent = [sum(t.numel() for t in row) for row in pieces]
    sizes = [[_numel(shape) for shape in row] for row in shapes]
    received = [sum(row) for row in sizes]
    leaving = torch.cat([t.reshape(-1) for row in pieces for t in row])
    arriving = like.new_empty(sum(received))
    if plan.ledger is not None:
        item = like.element_size()
        plan.ledger.transfers += _transfers(plan.group, [n * item for n in sent], [n * item for n in received])
    dist.all_to_all_single(arriving, leaving, received, sent, group=plan.group.handle)
    blocks = torch.split(arriving, [n for row in sizes for n in row])
    found, index = [], 0
    for row in shapes:
        found.append([block.view(shape) for block, shape in zip(blocks[index : index + len(row)], row, strict=True)])
        index += len(row)
    return found


def _transfers(group: Group, sent: Sequence[int], received: Sequence[int]) -> list[Transfer]:
    peers = [p for p in range(group.size) if p != group.rank]
    found = [Transfer("transpose", "send", group.ranks[p], sent[p]) for p in peers if sent[p]]
    return found + [Transfer("transpose", "receive", group.ranks[p], received[p]) for p in peers if received[p]]


def _width(plan: Transposition, numbers: Sequence[int], rank: int) -> int:
    return sum(_span(plan.heads[n][rank]) for n in numbers)


def _total(heads: Heads) -> int:
    return sum(_span(pair) for pair in heads)


def _span(pair: tuple[int, int]) -> int:
    return pair[1] - pair[0]


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
