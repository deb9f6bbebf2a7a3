"""handoff: a non-linear cell over many ranks against the same cell in one loop over the tokens.

Legend: B rows, S global tokens, D features.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layout_cases import layouts
from pool import Pool
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.handoff import Operands, handoff, idle_share, planned_handoff
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import Kept
from longctx.sequence.layout import LAYOUTS, Layout, Run

ROWS, SIZE = 5, 3


@dataclass(frozen=True)
class Case:
    layout: Layout
    pieces: int
    seed: int
    recompute: bool = False


@dataclass(frozen=True)
class Result:
    """Gradients are of this rank's tokens, and its share of those that every rank has."""

    outputs_BSD: Tensor
    last_BD: Tensor
    gradients: list[Tensor]
    transfers: list[Transfer]
    planned: list[Transfer]
    idle: float


def cell(operands: Operands, state: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Token by token; neither linear in the state nor independent of any operand."""
    (x,), (row,), (weight,) = operands
    outputs = []
    for t in range(x.shape[1]):
        state = torch.tanh(state @ weight + x[:, t] * row) + 0.3 * state
        outputs.append(state.square())
    return torch.stack(outputs, dim=1), state


def tensors(seed: int, length: int) -> list[Tensor]:
    """x, a factor per row, weights, first state, and the weights of the loss on outputs and last state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, length, SIZE), (ROWS, SIZE), (SIZE, SIZE), (ROWS, SIZE), (ROWS, length, SIZE), (ROWS, SIZE)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def sequence_group() -> Group:
    size = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(size, torch.device("cpu"), 30).sequence if size > 1 else alone().sequence


def solve(case: Case, group: Group) -> Result:
    ledger = Ledger()
    context = SequenceContext(group, case.layout, ((0,),) * ROWS, ledger=ledger)
    x, row, weight, initial, on_outputs, on_last = tensors(case.seed, case.layout.length)
    leaves = [t.requires_grad_() for t in (context.shard(x), row, weight, initial)]
    bounds = np.cumsum([0, *(run.size for run in case.layout.runs[group.rank])])
    runs = list(pairwise(bounds.tolist()))
    region = context.keeping(Kept()) if case.recompute else context

    def region_of(x: Tensor, row: Tensor, weight: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        operands = Operands((x * 1.5,), (row,), (weight,))
        y, last = handoff(cell, operands, initial, runs, region, shape=(SIZE,), pieces=case.pieces, final=True)
        assert last is not None
        return y, last

    y, last = checkpoint(region_of, *leaves, use_reentrant=True) if case.recompute else region_of(*leaves)
    ((y * context.shard(on_outputs)).sum() + (last * on_last).sum() / group.size).backward()
    gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]
    handed = [t for t in ledger.transfers if t.kind.startswith("handoff")]
    planned = planned_handoff(context, ROWS, case.pieces, SIZE * 8)
    return Result(context.unshard(y), last.detach(), gradients, handed, planned, idle_share(context, case.pieces))


def solve_all(cases: list[Case]) -> list[Result]:
    group = sequence_group()
    return [solve(case, group) for case in cases]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_it_is_the_loop_over_all_tokens(world: int, recompute: bool, pool: Pool, seed: int) -> None:
    """Outputs, last state, every gradient, and the traffic, for 1 to B pieces and more."""
    cases = [Case(layout, m, seed, recompute) for layout in layouts(world, seed) for m in (1, 3, ROWS, ROWS + 2)]
    ranks = pool.run(solve_all, world, cases)
    for number, case in enumerate(cases):
        found = [results[number] for results in ranks]
        wanted = solve(Case(LAYOUTS["contiguous"](case.layout.length, 1), 1, seed), alone().sequence)
        dx = torch.zeros_like(wanted.gradients[0])
        for rank, result in enumerate(found):
            torch.testing.assert_close(result.outputs_BSD, wanted.outputs_BSD, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.last_BD, wanted.last_BD, rtol=1e-12, atol=1e-12)
            dx[:, torch.from_numpy(case.layout.indices(rank))] = result.gradients[0]
            assert result.transfers == result.planned
        torch.testing.assert_close(dx, wanted.gradients[0], rtol=1e-10, atol=1e-12)
        for place in (1, 2, 3):
            total = torch.stack([result.gradients[place] for result in found]).sum(0)
            torch.testing.assert_close(total, wanted.gradients[place], rtol=1e-10, atol=1e-12)


def crossings(layout: Layout) -> int:
    """Neighbouring runs that different ranks hold."""
    owners = [rank for _, rank in sorted((run.start, rank) for rank, runs in enumerate(layout.runs) for run in runs)]
    return sum(a != b for a, b in pairwise(owners))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_traffic_is_one_state_per_boundary_there_and_back(world: int, pool: Pool, seed: int) -> None:
    cases = [Case(layout, 3, seed) for layout in layouts(world, seed)]
    for number, results in enumerate(zip(*pool.run(solve_all, world, cases), strict=True)):
        state = ROWS * SIZE * 8 * crossings(cases[number].layout)
        for kind in ("handoff", "handoff-return"):
            posted = [(r, t) for r, result in enumerate(results) for t in result.transfers if t.kind == kind]
            sent = [(r, t.peer, t.bytes) for r, t in posted if t.direction == "send"]
            received = [(t.peer, r, t.bytes) for r, t in posted if t.direction == "receive"]
            assert sorted(sent) == sorted(received)
            assert sum(size for _, _, size in sent) == state
            # Any two ranks post the messages between them in one order.
            for pair in {message[:2] for message in sent}:
                assert [m for m in sent if m[:2] == pair] == [m for m in received if m[:2] == pair]


def only_the_last_rank_has_a_loss(seed: int) -> Tensor:
    group = sequence_group()
    context = SequenceContext(group, LAYOUTS["contiguous"](7, group.size), ((0,),) * ROWS)
    x, row, weight, initial, on_outputs, _ = tensors(seed, 7)
    weight.requires_grad_()
    operands = Operands((context.shard(x),), (row,), (weight,))
    y, last = handoff(cell, operands, initial, [(0, context.local_length)], context, shape=(SIZE,), pieces=2)
    assert last is None
    (y * context.shard(on_outputs)).sum().mul(float(group.rank == group.size - 1)).backward()
    assert weight.grad is not None
    return weight.grad


def test_a_gradient_reaches_the_first_rank_from_the_last(pool: Pool, seed: int) -> None:
    assert all(share.abs().max() > 0 for share in pool.run(only_the_last_rank_has_a_loss, 3, seed))


class Nap(torch.autograd.Function):
    """The identity, for a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.05)
        return gradient


def napping(operands: Operands, state: Tensor, run: int) -> tuple[Tensor, Tensor]:
    state = Nap.apply(state)  # type: ignore[no-untyped-call]
    return operands.tokens[0] * state[:, None], state


def seconds_of_naps(pieces: int) -> float:
    group = sequence_group()
    context = SequenceContext(group, LAYOUTS["contiguous"](2, 2), ((0,),) * 8)
    x, initial = torch.ones(8, 1, SIZE, requires_grad=True), torch.ones(8, SIZE, requires_grad=True)
    dist.barrier(group=group.handle)
    start = time.monotonic()
    y, _ = handoff(napping, Operands((x,)), initial, [(0, 1)], context, shape=(SIZE,), pieces=pieces)
    y.sum().backward()
    dist.barrier(group=group.handle)
    return time.monotonic() - start


def test_ranks_work_at_the_same_time(pool: Pool) -> None:
    """8 pieces of 50 ms on two ranks, there and back: 1.6 s one after the other, 0.9 s in a pipeline."""
    assert max(pool.run(seconds_of_naps, 2, 8)) < 1.3


@pytest.mark.parametrize(("ranks", "pieces"), [(2, 1), (2, 8), (3, 2), (4, 5)])
def test_the_idle_share_is_that_of_the_formula(ranks: int, pieces: int) -> None:
    for name in ("contiguous", "zigzag"):
        group = Group(0, tuple(range(ranks)))
        context = SequenceContext(group, LAYOUTS[name](24 * ranks, ranks), ((0,),))
        assert idle_share(context, pieces) == pytest.approx((ranks - 1) / (pieces + ranks - 1))
    backwards = Layout(4, ((Run(2, 4),), (Run(0, 2),)))
    assert idle_share(SequenceContext(Group(0, (0, 1)), backwards, ((0,),)), 1) == pytest.approx(0.5)
    assert idle_share(SequenceContext.single(2, 5), 3) == 0
