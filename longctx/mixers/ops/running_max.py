"""The largest value that a document has had so far, and how it grows: the common scale of sums of exponentials.

A rank finds the maxima of its own runs, gathers one per run of every rank, and takes those before its runs in. No
gradient flows: the scale cancels between a numerator and its denominator.

Legend: B batch, T local tokens, n tokens of a run, ``*`` the shape of a value.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.sequence.collectives.gather import to_all
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.scan import run_order
from longctx.sequence.collectives.summaries import gather_summaries
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Run


class RunningMax(NamedTuple):
    """``top``: the maximum up to each token [B, T, *]; ``fall``: that of the token before minus it, 0 where a document
    starts [B, T, *], a log decay; ``final``: the maximum after the last token of all ranks [B, *].
    """

    top: Tensor
    fall: Tensor
    final: Tensor


def running_max(x_BT: Tensor, context: SequenceContext, before_B: Tensor) -> RunningMax:
    """Maxima along documents.

    Args:
        before_B: the maximum before the first token of the context [B, *], -inf for none; the same on every rank.
    """
    x_BT = x_BT.detach()
    own = context.layout.runs[context.rank]
    sizes = [run.size for run in own]
    parts = torch.split(x_BT, sizes, dim=1) if own else ()
    inside = [_inside(part, run, context) for part, run in zip(parts, own, strict=True)]
    most = max(len(runs) for runs in context.layout.runs)
    none = torch.full_like(before_B, float("-inf"), dtype=x_BT.dtype)
    lasts = torch.stack([top[:, -1] for top in inside] + [none] * (most - len(inside)))
    entering, final = _fold(gather_summaries(lasts, context), before_B.detach().to(x_BT.dtype), context)
    if not inside:
        return RunningMax(x_BT, x_BT, final)
    tops, falls, positions = [], [], torch.split(context.positions(x_BT.device), sizes, dim=1)
    for top, came, place in zip(inside, entering, positions, strict=True):
        index = _wide(torch.arange(place.shape[1], device=place.device), x_BT)
        top = torch.where(_wide(place, x_BT) > index, torch.maximum(top, came[:, None]), top)
        previous = torch.cat((came[:, None], top[:, :-1]), dim=1)
        tops.append(top)
        falls.append((previous - top).masked_fill(_wide(place, x_BT) == 0, 0))
    return RunningMax(torch.cat(tops, dim=1), torch.cat(falls, dim=1), final)


def planned_running_max(context: SequenceContext, numbers: int, itemsize: int) -> list[Transfer]:
    """What :func:`running_max` posts on this rank; nothing in the backward."""
    if context.degree == 1:
        return []
    most = max(len(runs) for runs in context.layout.runs)
    return to_all(context.group, "summary", most * context.batch * numbers * itemsize)


def _inside(x_Bn: Tensor, run: Run, context: SequenceContext) -> Tensor:
    """Maxima of what the run itself holds of each document, [B, n, *]."""
    starts = [{d - run.start for d in row if run.start < d < run.stop} for row in context.documents]
    tops: list[Tensor] = []
    for first, stop in pairwise([0, *sorted(set().union(*starts)), run.size]):
        top = x_Bn[:, first:stop].cummax(1).values
        if tops:
            fresh = torch.tensor([first in row for row in starts], device=x_Bn.device)
            top = torch.where(_wide(fresh[:, None], x_Bn), top, torch.maximum(top, tops[-1][:, -1:]))
        tops.append(top)
    return torch.cat(tops, dim=1)


def _fold(lasts: Tensor, top: Tensor, context: SequenceContext) -> tuple[Sequence[Tensor], Tensor]:
    """What enters each run of this rank, and what leaves the last run of all."""
    entering = []
    for rank, number in run_order(context):
        run = context.layout.runs[rank][number]
        if rank == context.rank:
            entering.append(top)
        starts = [any(run.start <= d < run.stop for d in row) for row in context.documents]
        fresh = torch.tensor(starts, device=top.device)
        last = lasts[rank, number]
        top = torch.where(fresh.view(-1, *[1] * (top.dim() - 1)), last, torch.maximum(top, last))
    return entering, top


def _wide(mask: Tensor, like: Tensor) -> Tensor:
    """[..., n] with the dimensions that ``like`` has behind its tokens."""
    return mask.view(*mask.shape, *[1] * (like.dim() - 2))
