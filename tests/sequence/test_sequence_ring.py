"""The ring: its schedule as pure integers, and the collectives for real against a naive gather."""

import random
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Pool

from longctx.runtime.mesh import alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.ring import Homeward, Schedule, circulate, planned_transfers
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS

ROW_BYTES, RETURN_BYTES = 24, 40


@st.composite
def schedules(draw: Any) -> tuple[Schedule, list[int]]:
    size = draw(st.integers(1, 6))
    last_hop = draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))
    return Schedule(tuple(last_hop)), draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))


def messages(planned: list[list[Transfer]], direction: str) -> dict[tuple[str, int, int], list[int]]:
    """Bytes of every message from one rank to another, in the order posted by its sender or by its receiver."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for rank, transfers in enumerate(planned):
        for t in transfers:
            if t.direction == direction:
                ends = (rank, t.peer) if direction == "send" else (t.peer, rank)
                found.setdefault((t.kind, *ends), []).append(t.bytes)
    return found


@settings(max_examples=300)
@given(schedules())
def test_every_send_has_its_receive(case: tuple[Schedule, list[int]]) -> None:
    schedule, sizes = case
    planned = [planned_transfers(r, schedule, sizes, ROW_BYTES, RETURN_BYTES) for r in range(schedule.size)]
    assert messages(planned, "send") == messages(planned, "receive")
    assert all(t.peer != rank for rank, transfers in enumerate(planned) for t in transfers)


@settings(max_examples=300)
@given(schedules())
def test_a_block_moves_exactly_as_far_as_it_is_needed(case: tuple[Schedule, list[int]]) -> None:
    schedule, sizes = case
    for source, last in enumerate(schedule.last_hop):
        carriers = [
            (hop, rank)
            for hop in range(schedule.hops + 1)
            for rank in range(schedule.size)
            if schedule.source(rank, hop) == source and schedule.holds(rank, hop)
        ]
        assert carriers == [(hop, (source + hop) % schedule.size) for hop in range(last + 1)]
        assert [schedule.forwards(rank, hop) for hop, rank in carriers] == [True] * last + [False]
    ranks = range(schedule.size)
    sent = [t for r in ranks for t in planned_transfers(r, schedule, sizes, ROW_BYTES, RETURN_BYTES)]
    moved = sum(hops * rows for hops, rows in zip(schedule.last_hop, sizes, strict=True))
    for kind, row_bytes in (("ring", ROW_BYTES), ("ring-return", RETURN_BYTES)):
        assert sum(t.bytes for t in sent if (t.kind, t.direction) == (kind, "send")) == moved * row_bytes


def test_a_block_nobody_needs_is_never_sent() -> None:
    schedule = Schedule((0, 2, 0))
    planned = [planned_transfers(rank, schedule, [1, 10, 100], 1, 1) for rank in range(3)]
    # Rank 1's block visits rank 2 and rank 0, and the sum goes home from there.
    assert planned[0] == [
        Transfer("ring", "receive", 2, 10),
        Transfer("ring-return", "receive", 2, 10),
        Transfer("ring-return", "send", 1, 10),
    ]
    assert {t.bytes for transfers in planned for t in transfers} == {10}
    assert planned_transfers(0, Schedule((0, 0, 0)), [1, 10, 100], 1, 1) == []


def random_ring(rng: random.Random, size: int) -> tuple[Schedule, list[int]]:
    """A schedule and block sizes; a block without rows is needed by nobody."""
    sizes = [rng.choice([0, 1, 2, 5, 13]) for _ in range(size)]
    return Schedule(tuple(rng.randrange(size) if rows else 0 for rows in sizes)), sizes


def block_of(seed: int, *key: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((seed, *key)) % 2**31)
    return torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64)


def ring_here(seed: int, rounds: int) -> int:
    """Random schedules on this world: what arrives, what comes home, and the ledger, against a naive gather."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = build_mesh(size, torch.device("cpu"), 60).sequence if size > 1 else alone().sequence
    messages_posted = 0
    for number in range(rounds):
        schedule, sizes = random_ring(random.Random(seed + number), size)
        blocks = [block_of(seed, number, r, rows=sizes[r]) for r in range(size)]
        ledger = Ledger()
        homeward = Homeward(blocks[rank], sizes, schedule, group, ledger)
        hops = []
        for hop, source, block in circulate(blocks[rank].clone(), sizes, schedule, group, ledger):
            hops.append(hop)
            assert source == (rank - hop) % size
            assert (block is not None) == (hop <= schedule.last_hop[source])
            assert block is None or torch.equal(block, blocks[source])
            if hop:
                homeward.add(hop, None if block is None else block_of(seed, number, rank, source, rows=sizes[source]))
        assert hops == list(range(schedule.hops + 1))
        arrived = homeward.arrived()
        helpers = [(rank + hop) % size for hop in range(1, schedule.last_hop[rank] + 1)]
        assert (arrived is None) == (not helpers)
        if arrived is not None:
            wanted = sum(block_of(seed, number, helper, rank, rows=sizes[rank]) for helper in helpers)
            torch.testing.assert_close(arrived, wanted, rtol=0, atol=1e-14)
        assert ledger.transfers == planned_transfers(rank, schedule, sizes, 48, 48)
        messages_posted += len(ledger.transfers)
    return messages_posted


def test_collectives_match_a_naive_gather(pool: Pool, seed: int) -> None:
    for world in (1, 2, 3, 4):
        posted = pool.run(ring_here, world, seed, 12)
        assert (sum(posted) > 0) == (world > 1)


def sharded_here(seed: int) -> None:
    size = dist.get_world_size()
    group = build_mesh(size, torch.device("cpu"), 60).sequence
    for length in (1, 2, 7, 16, 31):
        for name in sorted(LAYOUTS):
            context = SequenceContext(group, LAYOUTS[name](length, size), ((0,),) * 2)
            x_BS = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(context.unshard(context.shard(x_BS)), x_BS)
            assert torch.equal(context.unshard(context.shard(x_BS[..., 0])), x_BS[..., 0])


def test_unshard_gathers_what_shard_cut(pool: Pool, seed: int) -> None:
    for world in (2, 3, 4):
        pool.run(sharded_here, world, seed)
