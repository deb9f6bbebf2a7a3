"""Selection of the highest scores: as sorting finds them, ties included, on one rank and on several."""

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from longctx.cache.select import ranked, select
from longctx.runtime.mesh import build_mesh
from longctx.sequence.collectives.ledger import Ledger

LANES = 6


def drawn(seed: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with many ties and every sign, lanes and positions of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    lane, position = torch.arange(LANES).repeat_interleave(tokens), torch.arange(tokens).repeat(LANES)
    score = torch.randn(LANES * tokens, generator=generator)
    tied = torch.rand(LANES * tokens, generator=generator) < 0.5
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-40, -1e-40])
    draw = torch.randint(8, (LANES * tokens,), generator=generator)
    return torch.where(tied, special[draw], score), lane, position


def by_sorting(
    score: torch.Tensor, lane: torch.Tensor, position: torch.Tensor, group: torch.Tensor, budget: list[int]
) -> set[int]:
    kept: set[int] = set()
    for number, count in enumerate(budget):
        members = (group == number).nonzero()[:, 0].tolist()
        members.sort(key=lambda i: (float(score[i]), int(position[i]), int(lane[i])), reverse=True)
        kept |= set(members[:count])
    return kept


@pytest.mark.parametrize("joint", [False, True])
def test_the_highest_stay(joint: bool, seed: int) -> None:
    score, lane, position = drawn(seed, 41)
    group = lane // 3 if joint else lane
    budget = [20, 123] if joint else [0, 1, 7, 40, 41, 99]
    kept = select(ranked(score, lane, position, LANES), group, torch.tensor(budget))
    assert set(kept.nonzero()[:, 0].tolist()) == by_sorting(score, lane, position, group, budget)


def kept_here(seed: int) -> tuple[list[int], list[int]]:
    """Tokens that this rank keeps of those it holds, and the bytes of its messages."""
    ranks, ledger = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence, Ledger()
    score, lane, position = drawn(seed, 41)
    held = (position // 4 % ranks.size == ranks.rank).nonzero()[:, 0]
    rank_n = ranked(score[held], lane[held], position[held], LANES)
    kept = select(rank_n, lane[held], torch.tensor([0, 1, 7, 40, 41, 99]), ranks, ledger)
    return held[kept].tolist(), [t.bytes for t in ledger.transfers]


def test_ranks_keep_what_one_keeps(pool: Pool, seed: int) -> None:
    score, lane, position = drawn(seed, 41)
    wanted = by_sorting(score, lane, position, lane, [0, 1, 7, 40, 41, 99])
    for world in (2, 3, 4):
        found = pool.run(kept_here, world, seed)
        assert sorted(i for kept, _ in found for i in kept) == sorted(wanted)
        assert all(sum(sizes) < 8 * 2 * 2 * LANES * 256 * 8 for _, sizes in found)
