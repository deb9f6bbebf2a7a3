"""A fixed-size summary of every rank, or of one, on every rank; the gradients of all of them flow back to its owner."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.gather import collective, to_all
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once


def gather_summaries(own: Tensor, context: SequenceContext) -> Tensor:
    """[...] of this rank, of one shape everywhere, as [P, ...] in rank order.

    What a rank makes of the result must enter its loss (:func:`tie`), or the others wait for its gradient for ever.
    """
    if context.degree == 1:
        return own[None]

    def gather(own: Tensor) -> tuple[Tensor]:
        return (_Gather.apply(own, context.group, context.ledger),)  # type: ignore[no-untyped-call]

    return run_once(gather, (own,), context.kept)[0]


def share(own: Tensor, owner: int, context: SequenceContext) -> Tensor:
    """[...] of rank ``owner`` on every rank; the others give a tensor of the same shape, whose values do not matter.

    As for :func:`gather_summaries`, the result must enter the loss of every rank.
    """
    if context.degree == 1:
        return own

    def send(own: Tensor) -> tuple[Tensor]:
        return (_Share.apply(own, owner, context.group, context.ledger),)  # type: ignore[no-untyped-call]

    return run_once(send, (own,), context.kept)[0]


def summed(own: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of any group, in fp32 (fp64 stays fp64): statistics for between steps, no gradient."""
    own = own.detach().to(torch.promote_types(own.dtype, torch.float32))
    if group.size == 1:
        return own
    return gathered(own, group).sum(0)


def gathered(own: Tensor, group: Group, ledger: Ledger | None = None) -> Tensor:
    """[...] of every rank of any group, of one shape everywhere, as [P, ...] in rank order; no gradient."""
    if group.size == 1:
        return own[None]
    found: Tensor = _Gather.apply(own.detach(), group, ledger)  # type: ignore[no-untyped-call]
    return found


def tie(x: Tensor, *tokens: Tensor) -> Tensor:
    """``x``, whose backward also runs that of every token, with gradient 0."""
    tied: Tensor = _Tie.apply(x, *tokens)  # type: ignore[no-untyped-call]
    return tied


def planned_summaries(group: Group, size: int) -> list[Transfer]:
    """What the gathering of summaries of ``size`` bytes posts on this rank, forward and then backward."""
    if group.size == 1:
        return []
    return to_all(group, "summary", size) + to_all(group, "summary-return", size)


def planned_share(group: Group, owner: int, size: int) -> tuple[list[Transfer], list[Transfer]]:
    """What sharing ``size`` bytes of rank ``owner`` posts on this rank, forward and backward."""
    return _shared(group, owner, "share", size), _shared(group, owner, "share-return", size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group, ledger: Ledger | None) -> Tensor:
        ctx.group, ctx.ledger = group, ledger
        own = own.contiguous()
        _record(ledger, group, "summary", own)
        gathered = own.new_empty(group.size, *own.shape)
        collective("all_gather")(gathered.view(-1), own.view(-1), group=group.handle)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        gradients = gradients.contiguous()
        own = gradients.new_empty(gradients.shape[1:])
        _record(ctx.ledger, ctx.group, "summary-return", own)
        collective("reduce_scatter")(own.view(-1), gradients.view(-1), group=ctx.group.handle)
        return own, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, owner: int, group: Group, ledger: Ledger | None) -> Tensor:
        ctx.owner, ctx.group, ctx.ledger = owner, group, ledger
        shared = own.contiguous().clone()
        _record_share(ledger, group, owner, "share", shared)
        dist.broadcast(shared, group.ranks[owner], group=group.handle)
        return shared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradient.contiguous().clone()
        _record_share(ctx.ledger, ctx.group, ctx.owner, "share-return", total)
        dist.reduce(total, ctx.group.ranks[ctx.owner], group=ctx.group.handle)
        return (total if ctx.group.rank == ctx.owner else torch.zeros_like(total)), None, None, None


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tokens: Tensor) -> Tensor:
        ctx.zeros = [partial(token.new_zeros, token.shape) for token in tokens]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(zeros() for zeros in ctx.zeros)


def _record(ledger: Ledger | None, group: Group, kind: str, part: Tensor) -> None:
    if ledger is not None:
        ledger.transfers += to_all(group, kind, part.numel() * part.element_size())


def _record_share(ledger: Ledger | None, group: Group, owner: int, kind: str, part: Tensor) -> None:
    if ledger is not None:
        ledger.transfers += _shared(group, owner, kind, part.numel() * part.element_size())


def _shared(group: Group, owner: int, kind: str, size: int) -> list[Transfer]:
    """From the owner to everybody; the way back the other way round."""
    outward = (group.rank == owner) == (kind == "share")
    peers = [rank for place, rank in enumerate(group.ranks) if place != group.rank]
    if group.rank != owner:
        peers = [group.ranks[owner]] * (group.size > 1)
    return [Transfer(kind, "send" if outward else "receive", peer, size) for peer in peers]
