"""handoff: a state of fixed size that changes in any way along the sequence, handed from run to run, left to right.

The rows of the batch are worked on in pieces, as micro-batches in a pipeline (Huang et al., arXiv 1811.06965): while
one rank works on a piece, the rank of the next run works on the piece before. With P equal contiguous shards and M
pieces a rank is idle for the share (P - 1) / (M + P - 1) of the time, forward and backward; zigzag's two runs of half
the size have the same share. :func:`idle_share` finds it for any layout.

Order: a rank goes through its runs in the order of the sequence, and in each through the pieces; it posts all receives
of a run before the first of its sends. Any two ranks therefore post the messages between them in one order. All of it
is a single autograd node, whose backward walks the exact reverse: no order is left to autograd.

Legend: B rows (sequences, or sequences x heads), N local places along the sequence, P ranks, M pieces, ``*`` the shape
of a state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.mail import Mail
from longctx.sequence.collectives.scan import run_order
from longctx.sequence.collectives.summaries import gather_summaries
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once


class Operands(NamedTuple):
    """What a step works on, apart from the state; everything it may be differentiated by."""

    tokens: tuple[Tensor, ...]
    """[B, N, ...]: a step sees its rows and its run."""
    rows: tuple[Tensor, ...] = ()
    """[B, ...]: a step sees its rows."""
    shared: tuple[Tensor, ...] = ()
    """Weights: every step sees them whole."""


Step = Callable[[Operands, Tensor, int], tuple[Tensor, Tensor]]
"""Operands of some rows and one run, the state [b, *] before it, and the run's number among this rank's; returns the
outputs [b, n, ...] and the state after it. It must depend on nothing else that needs a gradient."""


def handoff(
    step: Step, operands: Operands, initial: Tensor, runs: Sequence[tuple[int, int]], context: SequenceContext, *,
    shape: Sequence[int], pieces: int = 1, final: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs [B, N, *shape] in the dtype of the state, and the state [B, *] after the last token of all ranks.

    With one rank it calls ``step`` run by run. In a recomputed region messages are sent once and the steps run again.

    Args:
        initial: the state before the first token of the context, the same on every rank.
        runs: for each run of this rank, in local order, its first of the N places and one past its last.
        pieces: groups of rows that are worked on in turn, at most B.
        final: whether the last state is asked for; it is gathered from its rank.
    """
    turns = _turns(context, runs)
    if context.degree == 1:
        return _alone(step, operands, initial, turns, shape)
    tensors = (initial, *operands.tokens, *operands.rows, *operands.shared)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        counts = (len(operands.tokens), len(operands.rows))
        length = runs[-1][1] if runs else 0
        job = _Job(
            step, turns, _cuts(len(initial), pieces), counts, (length, *shape), context.group, context.ledger,
            torch.is_grad_enabled(), context.kept is not None,
        )  # fmt: skip
        results: tuple[Tensor, ...] = _Handoff.apply(job, *tensors)  # type: ignore[no-untyped-call]
        return results

    outputs, last = run_once(run, tensors, context.kept)
    order = run_order(context)
    if not final:
        return outputs, None
    return outputs, gather_summaries(last, context)[order[-1][0]] if order else initial


def planned_handoff(context: SequenceContext, rows: int, pieces: int, row_bytes: int) -> list[Transfer]:
    """What a handoff without ``final`` posts on this rank, forward and then backward; ``row_bytes``: of one state."""
    if context.degree == 1:
        return []
    ranks = context.group.ranks
    turns = _turns(context, [(0, 0)] * len(context.layout.runs[context.rank]))
    sizes = [(cut.stop - cut.start) * row_bytes for cut in _cuts(rows, pieces)]
    there, back = [], []
    for turn in turns:
        there += [Transfer("handoff", "receive", ranks[turn.left], s) for s in sizes if turn.left is not None]
        there += [Transfer("handoff", "send", ranks[turn.right], s) for s in sizes if turn.right is not None]
    sizes = sizes[::-1]
    for turn in reversed(turns):
        back += [Transfer("handoff-return", "receive", ranks[turn.right], s) for s in sizes if turn.right is not None]
        back += [Transfer("handoff-return", "send", ranks[turn.left], s) for s in sizes if turn.left is not None]
    return there + back


def default_pieces(context: SequenceContext) -> int:
    """Four per rank: of P ranks with one run each, none waits longer than (P - 1) / (5 P - 1) of the time."""
    return 4 * context.degree


def idle_share(context: SequenceContext, pieces: int) -> float:
    """Share of the time that ranks wait, if every token of every row costs the same and messages cost nothing.

    (P - 1) / (M + P - 1) for equal contiguous shards.
    """
    layout, order = context.layout, run_order(context)
    free, done = [0.0] * layout.degree, [0.0] * pieces
    for rank, number in order:
        for piece in range(pieces):
            free[rank] = done[piece] = max(free[rank], done[piece]) + layout.runs[rank][number].size / pieces
    return 1 - sum(layout.sizes) / (layout.degree * max(free)) if order else 0.0


class _Turn(NamedTuple):
    """One run of this rank: its number, its places, and the ranks before and after it where they are others."""

    number: int
    start: int
    stop: int
    left: int | None
    right: int | None
    ends: bool


def _turns(context: SequenceContext, runs: Sequence[tuple[int, int]]) -> list[_Turn]:
    """The runs of this rank in the order of the sequence."""
    order = run_order(context)
    owners = [context.rank, *(rank for rank, _ in order), context.rank]
    turns = []
    for place, (rank, number) in enumerate(order):
        if rank == context.rank:
            left, right = (None if owner == rank else owner for owner in (owners[place], owners[place + 2]))
            turns.append(_Turn(number, *runs[number], left, right, place == len(order) - 1))
    return turns


def _cuts(rows: int, pieces: int) -> list[slice]:
    pieces = max(1, min(rows, pieces))
    return [slice(rows * i // pieces, rows * (i + 1) // pieces) for i in range(pieces)]


def _alone(
    step: Step, operands: Operands, state: Tensor, turns: Sequence[_Turn], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    parts = {}
    for turn in turns:
        tokens = tuple(t[:, turn.start : turn.stop] for t in operands.tokens)
        parts[turn.number], state = step(operands._replace(tokens=tokens), state, turn.number)
    outputs = [parts[number] for number in sorted(parts)]
    return torch.cat(outputs, dim=1) if outputs else state.new_empty(len(state), 0, *shape), state


@dataclass(frozen=True, eq=False)
class _Job:
    step: Step
    turns: Sequence[_Turn]
    cuts: Sequence[slice]
    counts: tuple[int, int]  # tensors of the operands that are cut by rows and run, and by rows
    shape: tuple[int, ...]
    group: Group
    ledger: Ledger | None
    differentiable: bool
    again: bool  # steps run a second time in the backward

    def cut(self, tensors: Sequence[Tensor], turn: _Turn, rows: slice) -> list[Tensor]:
        """Views of the operands, in one list, that one step sees."""
        tokens, by_row = self.counts
        seen = [t[rows, turn.start : turn.stop] for t in tensors[:tokens]]
        return seen + [t[rows] for t in tensors[tokens : tokens + by_row]] + list(tensors[tokens + by_row :])

    def run(self, tensors: Sequence[Tensor], state: Tensor, turn: _Turn) -> tuple[Tensor, Tensor]:
        tokens, by_row = self.counts
        operands = Operands(
            tuple(tensors[:tokens]), tuple(tensors[tokens : tokens + by_row]), tuple(tensors[tokens + by_row :])
        )
        return self.step(operands, state, turn.number)


class _Call(NamedTuple):
    """One step with its graph: leaves (the state first) and results."""

    leaves: list[Tensor]
    results: tuple[Tensor, Tensor]


def _call(
    job: _Job, tensors: Sequence[Tensor], state: Tensor, turn: _Turn, rows: slice, needs: Sequence[bool]
) -> _Call:
    """Run a step under gradients. A state from another run always needs one, which its sender waits for."""
    needs = (needs[0] or turn.left is not None or turn is not job.turns[0], *needs[1:])
    with torch.enable_grad():
        given = [state, *job.cut(tensors, turn, rows)]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
        return _Call(leaves, job.run(leaves[1:], leaves[0], turn))


class _Handoff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, initial: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.job, ctx.calls = job, []
        ctx.save_for_backward(initial, *tensors)
        output, last = initial.new_empty(len(initial), *job.shape), torch.zeros_like(initial)
        mail = Mail(job.group, job.group.handle, "handoff", job.ledger)
        states = [initial[rows] for rows in job.cuts]
        for turn in job.turns:
            arriving = [mail.receive(turn.left, state) for state in states] if turn.left is not None else None
            for piece, rows in enumerate(job.cuts):
                state = states[piece] if arriving is None else arriving[piece].land()
                if job.differentiable and not job.again:
                    ctx.calls.append(_call(job, tensors, state, turn, rows, ctx.needs_input_grad[1:]))
                    part, after = (t.detach() for t in ctx.calls[-1].results)
                else:
                    ctx.calls += [state] * job.differentiable
                    part, after = job.run(job.cut(tensors, turn, rows), state, turn)
                output[rows, turn.start : turn.stop], states[piece] = part, after
                if turn.right is not None:
                    mail.send(turn.right, after)
                elif turn.ends:
                    last[rows] = after
        mail.close()
        return output, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        initial, *tensors = ctx.saved_tensors
        sums = _Sums(job, tensors)
        mail = Mail(job.group, job.group.returning, "handoff-return", job.ledger)
        dstates = [dlast[rows] for rows in job.cuts]
        for turn in reversed(job.turns):
            arriving = [mail.receive(turn.right, d) for d in dstates[::-1]][::-1] if turn.right is not None else None
            for piece, rows in reversed(list(enumerate(job.cuts))):
                dstate = dstates[piece] if arriving is None else arriving[piece].land()
                call = ctx.calls.pop()
                if job.again:
                    call = _call(job, tensors, call, turn, rows, ctx.needs_input_grad[1:])
                dstates[piece], found = _gradients(call, (doutput[rows, turn.start : turn.stop], dstate))
                if turn.left is not None:
                    mail.send(turn.left, dstates[piece])
                sums.add(found, turn, rows)
        mail.close()
        first = bool(job.turns) and job.turns[0].left is None
        dinitial = torch.cat(dstates) if first else torch.zeros_like(initial)
        return (None, dinitial, *sums.gradients(ctx.needs_input_grad[2:]))


def _gradients(call: _Call, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    """Of the state, and of every operand that needs one."""
    pairs = [(result, g) for result, g in zip(call.results, gradients, strict=True) if result.requires_grad]
    wanted = [leaf for leaf in call.leaves if leaf.requires_grad]
    results = [result for result, _ in pairs]
    found = iter(torch.autograd.grad(results, wanted, [g for _, g in pairs], allow_unused=True))
    dstate, *rest = (next(found) if leaf.requires_grad else None for leaf in call.leaves)
    return torch.zeros_like(call.leaves[0]) if dstate is None else dstate, rest


class _Sums:
    """Gradients of the operands, added up over the steps in fp32 (fp64 stays fp64)."""

    def __init__(self, job: _Job, tensors: Sequence[Tensor]) -> None:
        self._job = job
        self._dtypes = [t.dtype for t in tensors]
        self._sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]

    def add(self, gradients: Sequence[Tensor | None], turn: _Turn, rows: slice) -> None:
        for total, gradient in zip(self._job.cut(self._sums, turn, rows), gradients, strict=True):
            if gradient is not None:
                total += gradient

    def gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        rows = zip(self._sums, self._dtypes, needed, strict=True)
        return [total.to(dtype) if need else None for total, dtype, need in rows]
