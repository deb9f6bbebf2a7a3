"""halo: a few rows before or after each of this rank's runs, or any others, from whichever ranks hold them.

A halo longer than a run spans several ranks; every row comes straight from its owner, in one message per pair of ranks.
The gradients of the rows return to their owners the same way.

Legend: B batch, T local tokens, R runs of this rank, W rows of a halo.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Direction, Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once
from longctx.sequence.layout import Layout
from longctx.sequence.tables import Tables

Ints = npt.NDArray[np.int64]


def halo_before(
    x_BT: Tensor, context: SequenceContext, width: int, past_BW: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The ``width`` rows before each run, [B, R, W, ...], and the last ``width`` rows of all, [B, W, ...].

    Rows before the first token of the context come from ``past_BW``, or are 0. The last rows, the ``past_BW`` of the
    tokens to come, are found only where ``past_BW`` is given.
    """
    plan = _plan(context, "before", width, past_BW is not None)
    rows = _fetch(plan, x_BT, past_BW, context)
    return (rows, None) if past_BW is None else (rows[:, :-1], rows[:, -1])


def halo_after(x_BT: Tensor, context: SequenceContext, width: int) -> Tensor:
    """The ``width`` rows after each run, [B, R, W, ...]; 0 behind the last token."""
    return _fetch(_plan(context, "after", width, False), x_BT, None, context)


def planned_halo(
    context: SequenceContext, side: str, width: int, row_bytes: int, with_last: bool = False
) -> tuple[list[Transfer], list[Transfer]]:
    """What a halo posts on this rank, forward and backward; ``side``: before or after; ``row_bytes``: of one token."""
    plan = _plan(context, side, width, with_last)
    size = context.batch * row_bytes
    return _transfers(plan, context.group, "halo", size), _transfers(plan, context.group, "halo-return", size, True)


def rows_at(x_BT: Tensor, context: SequenceContext, name: str, wanted: Sequence[Ints]) -> Tensor:
    """The rows with the global indices ``wanted[rank]``, [B, W, ...], in that order.

    Args:
        name: what the wish is called; a context is asked for one wish of a name only, and plans it once.
        wanted: what every rank asks for, the same on all.
    """
    return _fetch(_plan_of(context, name, wanted), x_BT, None, context)[:, 0]


def planned_rows(
    context: SequenceContext, name: str, wanted: Sequence[Ints], row_bytes: int
) -> tuple[list[Transfer], list[Transfer]]:
    """What :func:`rows_at` posts on this rank, forward and backward; integers have no backward."""
    plan, size = _plan_of(context, name, wanted), context.batch * row_bytes
    return _transfers(plan, context.group, "halo", size), _transfers(plan, context.group, "halo-return", size, True)


def shifted(x_BT: Tensor, before_BRW: Tensor, context: SequenceContext, back: int) -> Tensor:
    """Row t - ``back`` at the place of row t, [B, T, ...]; 0 where that is of another document.

    ``before_BRW``: a halo of at least ``back`` rows.
    """
    if back == 0:
        return x_BT
    width = before_BRW.shape[2]
    runs = context.layout.runs[context.rank]
    parts, first = [], 0
    for number, run in enumerate(runs):
        rows = torch.cat((before_BRW[:, number, width - back :], x_BT[:, first : first + run.size]), dim=1)
        parts.append(rows[:, : run.size])
        first += run.size
    # Without any run the result still hangs on the halo, whose backward sends.
    moved = torch.cat(parts, dim=1) if parts else x_BT + before_BRW.sum()
    inside = context.positions(x_BT.device) >= back
    return moved * inside.view(*inside.shape, *[1] * (x_BT.dim() - 2)).to(x_BT.dtype)


@dataclass(frozen=True)
class _Plan:
    """Rows of this rank's halo and how they come: places among the [n * W] rows wanted, local rows of the owners."""

    width: int
    spans: int
    own: tuple[Ints, Ints]  # places, local rows
    past: tuple[Ints, Ints]  # places, rows of the past
    receive: tuple[tuple[int, Ints], ...]  # peer, places
    send: tuple[tuple[int, Ints], ...]  # peer, local rows
    _tables: Tables = field(default_factory=Tables, init=False, repr=False, compare=False)

    def on(self, index: Ints, like: Tensor) -> Tensor:
        """One of the indices above, on a device."""
        return self._tables.on(like.device, id(index), lambda: index)


def _plan(context: SequenceContext, side: str, width: int, with_last: bool) -> _Plan:
    key = ("halo", context.rank, side, width, with_last)
    plan: _Plan = context.once(key, partial(_find, context, side, width, with_last))
    return plan


def _plan_of(context: SequenceContext, name: str, wanted: Sequence[Ints]) -> _Plan:
    key = ("rows", context.rank, name)
    plan: _Plan = context.once(key, lambda: _of_wanted(context, wanted, len(wanted[context.rank]), 1))
    return plan


def _find(context: SequenceContext, side: str, width: int, with_last: bool) -> _Plan:
    wanted = [_wanted(context.layout, r, side, width, with_last) for r in range(context.degree)]
    return _of_wanted(context, wanted, width, len(wanted[context.rank]) // width)


def _of_wanted(context: SequenceContext, wanted: Sequence[Ints], width: int, spans: int) -> _Plan:
    layout, rank = context.layout, context.rank
    if any(run.step != 1 for runs in layout.runs for run in runs):
        raise UnsupportedError("a halo is of runs of neighbouring tokens; use a layout other than striped")
    owned = [_owners(layout, rows) for rows in wanted]
    owner, local = owned[rank]
    mine = np.flatnonzero(owner == rank)
    before = np.flatnonzero((owner < 0) & (wanted[rank] < context.past) & (wanted[rank] >= context.past - width))
    peers = [p for p in range(layout.degree) if p != rank]
    receive = [(p, np.flatnonzero(owner == p)) for p in peers]
    send = [(p, owned[p][1][owned[p][0] == rank]) for p in peers]
    return _Plan(
        width, spans, (mine, local[mine]), (before, wanted[rank][before] - context.past + width),
        tuple((p, rows) for p, rows in receive if len(rows)), tuple((p, rows) for p, rows in send if len(rows)),
    )  # fmt: skip


def _wanted(layout: Layout, rank: int, side: str, width: int, with_last: bool) -> Ints:
    """Global indices of all rows that a rank wants, one span of ``width`` after the other."""
    edges = [run.start - width if side == "before" else run.stop for run in layout.runs[rank]]
    if with_last:
        edges.append(layout.length - width)
    return np.concatenate([np.empty(0, np.int64), *(np.arange(e, e + width) for e in edges)])


def _owners(layout: Layout, rows: Ints) -> tuple[Ints, Ints]:
    """Owner of every global row, -1 for none, and its local index there."""
    runs = sorted((run.start, run.stop, rank, offset) for rank, run, offset in _placed(layout))
    if not runs:
        return np.full(len(rows), -1), np.zeros(len(rows), dtype=np.int64)
    starts, stops, ranks, offsets = (np.array(column, dtype=np.int64) for column in zip(*runs, strict=True))
    place = np.searchsorted(starts, rows, side="right") - 1
    held = (place >= 0) & (rows < stops[place])
    return np.where(held, ranks[place], -1), np.where(held, offsets[place] + rows - starts[place], 0)


def _placed(layout: Layout) -> list[tuple[int, Any, int]]:
    found = []
    for rank, runs in enumerate(layout.runs):
        offset = 0
        for run in runs:
            found.append((rank, run, offset))
            offset += run.size
    return found


def _fetch(plan: _Plan, x_BT: Tensor, past_BW: Tensor | None, context: SequenceContext) -> Tensor:
    """[B, spans, W, ...]"""
    if past_BW is not None and past_BW.shape[1] != plan.width:
        raise ValueError(f"the past holds {past_BW.shape[1]} rows for a halo of {plan.width}")
    past_BW = x_BT.new_zeros(x_BT.shape[0], plan.width, *x_BT.shape[2:]) if past_BW is None else past_BW.to(x_BT.dtype)

    def fetch(x_BT: Tensor, past_BW: Tensor) -> tuple[Tensor]:
        return (_Fetch.apply(x_BT, past_BW, plan, context.group, context.ledger),)  # type: ignore[no-untyped-call]

    return run_once(fetch, (x_BT, past_BW), context.kept)[0].view(len(x_BT), plan.spans, plan.width, *x_BT.shape[2:])


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, past_BW: Tensor, plan: _Plan, group: Group, ledger: Ledger | None) -> Tensor:
        ctx.plan, ctx.group, ctx.ledger = plan, group, ledger
        ctx.tokens, ctx.past_rows = x_BT.shape[1], past_BW.shape[1]
        rows = x_BT.new_zeros(x_BT.shape[0], plan.spans * plan.width, *x_BT.shape[2:])
        arriving = [(p, places, _like(x_BT, len(places))) for p, places in plan.receive]
        leaving = [(p, x_BT.index_select(1, plan.on(local, x_BT))) for p, local in plan.send]
        _exchange(leaving, [(p, t) for p, _, t in arriving], group, group.handle, "halo", ledger)
        for places, source, local in ((plan.own[0], x_BT, plan.own[1]), (plan.past[0], past_BW, plan.past[1])):
            rows.index_copy_(1, plan.on(places, rows), source.index_select(1, plan.on(local, rows)))
        for _, places, part in arriving:
            rows.index_copy_(1, plan.on(places, rows), part)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        plan: _Plan = ctx.plan
        leaving = [(p, gradient.index_select(1, plan.on(places, gradient))) for p, places in plan.receive]
        arriving = [(p, local, _like(gradient, len(local))) for p, local in plan.send]
        back = [(p, t) for p, _, t in arriving]
        _exchange(leaving, back, ctx.group, ctx.group.returning, "halo-return", ctx.ledger)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        dx = _like(gradient, ctx.tokens, wide).zero_()
        dpast = _like(gradient, ctx.past_rows, wide).zero_()
        for total, places, local in ((dx, *plan.own), (dpast, *plan.past)):
            total.index_add_(1, plan.on(local, gradient), gradient.index_select(1, plan.on(places, gradient)).to(wide))
        for _, local, part in arriving:
            dx.index_add_(1, plan.on(local, gradient), part.to(wide))
        return dx.to(gradient.dtype), dpast.to(gradient.dtype), None, None, None


def _exchange(
    leaving: Sequence[tuple[int, Tensor]], arriving: Sequence[tuple[int, Tensor]], group: Group,
    handle: dist.ProcessGroup | None, kind: str, ledger: Ledger | None,
) -> None:  # fmt: skip
    sends = [dist.P2POp(dist.isend, t.contiguous(), group.ranks[p], group=handle) for p, t in leaving]
    receives = [dist.P2POp(dist.irecv, t, group.ranks[p], group=handle) for p, t in arriving]
    if ledger is not None:
        ledger.transfers += [_transfer(kind, "send", group, p, t) for p, t in leaving]
        ledger.transfers += [_transfer(kind, "receive", group, p, t) for p, t in arriving]
    if sends or receives:
        for work in dist.batch_isend_irecv(sends + receives):
            work.wait()


def _transfer(kind: str, direction: Direction, group: Group, peer: int, part: Tensor) -> Transfer:
    return Transfer(kind, direction, group.ranks[peer], part.numel() * part.element_size())


def _transfers(plan: _Plan, group: Group, kind: str, size: int, back: bool = False) -> list[Transfer]:
    out, in_ = (plan.receive, plan.send) if back else (plan.send, plan.receive)
    sends = [Transfer(kind, "send", group.ranks[p], len(rows) * size) for p, rows in out]
    return sends + [Transfer(kind, "receive", group.ranks[p], len(rows) * size) for p, rows in in_]


def _like(x: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape[0], rows, *x.shape[2:], dtype=dtype)
