"""halo: rows before or after the runs of many ranks against slices of the whole tensor.

Legend: B rows, S global tokens, T local tokens, R runs of a rank, W rows of a halo, D features.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from layout_cases import layouts
from pool import Pool
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.halo import halo_after, halo_before, planned_halo
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import Kept
from longctx.sequence.layout import Layout, contiguous, striped

ROWS, SIZE = 2, 3
SIDES = ["before", "after"]


@dataclass(frozen=True)
class Case:
    side: str
    layout: Layout
    width: int
    seed: int
    recompute: bool = False

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(ROWS, self.layout.length, SIZE, generator=generator, dtype=torch.float64)

    def weight(self, rank: int) -> Tensor:
        """Of a rank's halo in the loss, [B, R, W, D]."""
        generator = torch.Generator().manual_seed(self.seed + 1 + rank)
        shape = (ROWS, len(self.layout.runs[rank]), self.width, SIZE)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Result:
    """Gradients are of this rank's tokens."""

    halo_BRWD: Tensor
    dx_BTD: Tensor
    transfers: list[Transfer]
    planned: list[Transfer]


def halo(side: str, x_BTD: Tensor, context: SequenceContext, width: int) -> Tensor:
    return halo_before(x_BTD, context, width)[0] if side == "before" else halo_after(x_BTD, context, width)


def solve(case: Case, group: Group) -> Result:
    ledger = Ledger()
    # A halo looks at no document: what reads it does.
    documents = ((0,), tuple(range(case.layout.length)))
    context = SequenceContext(group, case.layout, documents, ledger=ledger)
    region = context.keeping(Kept()) if case.recompute else context
    x = context.shard(case.inputs()).requires_grad_()

    def region_of(x: Tensor) -> Tensor:
        return halo(case.side, x, region, case.width)

    rows = checkpoint(region_of, x, use_reentrant=True) if case.recompute else region_of(x)
    (rows * case.weight(group.rank)).sum().backward()
    assert x.grad is not None
    there, back = planned_halo(context, case.side, case.width, SIZE * 8)
    return Result(rows.detach(), x.grad, ledger.transfers, there + back)


def solve_all(cases: list[Case]) -> list[Result]:
    size = dist.get_world_size()
    group = build_mesh(size, torch.device("cpu"), 30).sequence if size > 1 else alone().sequence
    return [solve(case, group) for case in cases]


def slices(case: Case) -> tuple[list[Tensor], Tensor]:
    """Every rank's halo out of the whole tensor, with zeros around it, and the gradient [B, S, D]."""
    x, width = case.inputs().requires_grad_(), case.width
    padded = torch.nn.functional.pad(x, (0, 0, width, width))
    halos = []
    for runs in case.layout.runs:
        starts = [run.start - width if case.side == "before" else run.stop for run in runs]
        spans = [padded[:, start + width : start + 2 * width] for start in starts]
        halos.append(torch.stack(spans, dim=1) if spans else x.new_zeros(ROWS, 0, width, SIZE))
    loss = torch.stack([(rows * case.weight(rank)).sum() for rank, rows in enumerate(halos)]).sum()
    return halos, torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_it_is_slices_of_the_whole(side: str, world: int, pool: Pool, seed: int) -> None:
    """Rows, gradients and traffic, for halos within a neighbour, over several ranks, and beyond the whole sequence."""
    cases = [
        Case(side, layout, width, seed, recompute)
        for layout in layouts(world, seed)
        for width in (1, 3, 8, 20)
        for recompute in (False, True)
    ]
    ranks = pool.run(solve_all, world, cases)
    for number, case in enumerate(cases):
        halos, gradient = slices(case)
        dx = torch.zeros_like(gradient)
        for rank, result in enumerate(results[number] for results in ranks):
            assert torch.equal(result.halo_BRWD, halos[rank])
            dx[:, torch.from_numpy(case.layout.indices(rank))] = result.dx_BTD
            assert result.transfers == result.planned
        torch.testing.assert_close(dx, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_a_halo_over_several_hops_is_one_message_from_each_owner(side: str) -> None:
    """Seven rows around shards of three: as many whole shards as fit, and one row of the third."""
    counts = {0: [(1, 3), (2, 3), (3, 1)], 1: [(2, 3), (3, 3)], 2: [(3, 3)], 3: []}
    if side == "before":
        counts = {3 - rank: [(3 - peer, rows) for peer, rows in reversed(found)] for rank, found in counts.items()}
    for rank, owners in counts.items():
        context = SequenceContext(Group(rank, (0, 1, 2, 3)), contiguous(12, 4), ((0,),) * ROWS)
        there, back = planned_halo(context, side, 7, SIZE * 8)
        size = ROWS * SIZE * 8
        assert [t for t in there if t.direction == "receive"] == [
            Transfer("halo", "receive", peer, rows * size) for peer, rows in owners
        ]
        assert [t for t in back if t.direction == "send"] == [
            Transfer("halo-return", "send", peer, rows * size) for peer, rows in owners
        ]


@pytest.mark.parametrize("side", SIDES)
def test_runs_of_tokens_apart_are_refused(side: str) -> None:
    context = SequenceContext(Group(0, (0, 1)), striped(6, 2), ((0,),))
    with pytest.raises(UnsupportedError, match="a layout other than striped"):
        halo(side, torch.zeros(1, 3, SIZE), context, 1)
