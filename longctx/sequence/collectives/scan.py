"""scan: states that change affinely along the sequence, ``S <- S o M + A``, over all chunks of all ranks.

``o`` is the element-wise product (scalar and diagonal transitions, broadcast over the state) or the matrix product from
the right. A rank folds its own runs from zero, gathers one summary (M, A) per run of every rank, folds those before
each of its runs, and corrects its states with what enters. All in fp32 (fp64 stays fp64); autograd transposes it.

Legend: B batch, N chunks of this rank, P ranks, ``*`` the shape of a state.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.sequence.chunks import Chunks
from longctx.sequence.collectives.ledger import Transfer
from longctx.sequence.collectives.summaries import gather_summaries, planned_summaries, tie
from longctx.sequence.context import SequenceContext


class Scanned(NamedTuple):
    """The state that enters every chunk, [B, N, *], and the one after the last token of all ranks, [B, *]."""

    entering: Tensor
    final: Tensor


def scan(
    transition: Tensor, addition: Tensor, chunks: Chunks, context: SequenceContext, initial: Tensor | None = None, *,
    matrix: bool = False,
) -> Scanned:  # fmt: skip
    """Fold over chunks.

    Args:
        transition: M of every chunk: [B, N, ...], broadcasting over the states; with ``matrix`` [B, N, ..., E, E].
        addition: A of every chunk, [B, N, *].
        initial: the state [B, *] before the first token of the context, the same on every rank; None: zero.
    """
    wide = torch.promote_types(addition.dtype, torch.float32)
    transition, addition = transition.to(wide), addition.to(wide)
    apply = torch.matmul if matrix else torch.mul
    start = addition.new_zeros(addition.shape[0], *addition.shape[2:]) if initial is None else initial.to(wide)
    order = run_order(context)
    if len(order) == 1 and context.degree == 1:
        entering, final = _sweep(transition, addition, start, apply)
        return Scanned(entering, final)
    swept, summaries = [], []
    for first, stop in chunks.runs:
        entering, total = _sweep(transition[:, first:stop], addition[:, first:stop], torch.zeros_like(start), apply)
        passing, whole = _products(transition[:, first:stop], matrix)
        swept.append((entering, passing))
        summaries.append((whole, total))
    gathered = gather_summaries(_pack(summaries, transition, addition, context), context)
    shapes = (transition.shape[2:], addition.shape[2:])
    entering_runs, final = _fold(_unpack(gathered, order, len(start), shapes), start, apply)
    own = [state for state, (rank, _) in zip(entering_runs, order, strict=True) if rank == context.rank]
    corrected = [here + apply(there[:, None], passing) for (here, passing), there in zip(swept, own, strict=True)]
    entering = torch.cat(corrected, dim=1) if corrected else addition.new_empty(addition.shape)
    return Scanned(tie(entering, gathered), final)


def run_order(context: SequenceContext) -> list[tuple[int, int]]:
    """(rank, number among its runs) of all runs, in the order of the sequence."""
    runs = [(run.start, rank, number) for rank, own in enumerate(context.layout.runs) for number, run in enumerate(own)]
    return [(rank, number) for _, rank, number in sorted(runs)]


def planned_scan(context: SequenceContext, transition: int, state: int, itemsize: int) -> list[Transfer]:
    """What a scan posts on this rank, forward and then backward; numbers of one row's transition and state."""
    most = max(len(runs) for runs in context.layout.runs)
    return planned_summaries(context.group, most * context.batch * (transition + state) * itemsize)


def _sweep(
    transition: Tensor, addition: Tensor, state: Tensor, apply: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The state before every chunk [B, n, *], and after the last."""
    states = []
    for M, A in zip(transition.unbind(1), addition.unbind(1), strict=True):
        states.append(state)
        state = apply(state, M) + A
    return torch.stack(states, dim=1), state


def _products(transition: Tensor, matrix: bool) -> tuple[Tensor, Tensor]:
    """The product of all transitions before every chunk, and of all."""
    product = _identity(transition[:, 0], matrix)
    products = []
    for M in transition.unbind(1):
        products.append(product)
        product = product @ M if matrix else product * M
    return torch.stack(products, dim=1), product


def _identity(like: Tensor, matrix: bool) -> Tensor:
    if not matrix:
        return torch.ones_like(like)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _pack(
    summaries: Sequence[tuple[Tensor, Tensor]], transition: Tensor, addition: Tensor, context: SequenceContext
) -> Tensor:
    """[R, B, numbers]; ranks with fewer runs than others have zeros, which nobody reads."""
    rows = [torch.cat((whole.flatten(1), total.flatten(1)), dim=1) for whole, total in summaries]
    numbers = math.prod(transition.shape[2:]) + math.prod(addition.shape[2:])
    # Also where there is no run, the result hangs on the operands: this rank takes part in the backward.
    none = (transition.sum() + addition.sum()) * 0 if not rows else addition.new_zeros(())
    missing = max(len(runs) for runs in context.layout.runs) - len(rows)
    return torch.stack(rows + [none.expand(addition.shape[0], numbers)] * missing)


def _unpack(
    gathered: Tensor, order: Sequence[tuple[int, int]], batch: int, shapes: tuple[torch.Size, torch.Size]
) -> list[tuple[Tensor, Tensor]]:
    count = math.prod(shapes[0])
    rows = [gathered[rank, number] for rank, number in order]
    return [(row[:, :count].view(batch, *shapes[0]), row[:, count:].view(batch, *shapes[1])) for row in rows]


def _fold(
    summaries: Sequence[tuple[Tensor, Tensor]], state: Tensor, apply: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    entering = []
    for whole, total in summaries:
        entering.append(state)
        state = apply(state, whole) + total
    return entering, state
