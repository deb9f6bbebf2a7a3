"""The ring: its schedule as pure integers, and the collectives for real against a naive gather."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Pool

from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.ring import Homeward, circulate
from longctx.sequence.collectives.schedule import Schedule, planned_transfers, ring_schedule
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS

ROW_BYTES, RETURN_BYTES = 24, 40


@st.composite
def schedules(draw: Any) -> tuple[Schedule, list[int]]:
    size = draw(st.integers(1, 8))
    width = draw(st.sampled_from([w for w in range(1, size + 1) if size % w == 0]))
    needs = np.array(draw(st.lists(st.booleans(), min_size=size * size, max_size=size * size))).reshape(size, size)
    return ring_schedule(needs, width), draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))


def plan_of(schedule: Schedule, rank: int, sizes: list[int], home: int | None = RETURN_BYTES) -> list[Transfer]:
    return planned_transfers(Group(rank, tuple(range(schedule.size))), schedule, sizes, ROW_BYTES, home)


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
def test_rows_that_are_counted_are_rows_that_are_posted(case: tuple[Schedule, list[int]]) -> None:
    """By these a plan decides what travels."""
    schedule, sizes = case
    posted = [t for rank in range(schedule.size) for t in plan_of(schedule, rank, sizes) if t.direction == "send"]
    home = sum(t.bytes for t in posted if t.kind == "ring-return")
    there = sum(t.bytes for t in posted) - home
    assert schedule.rows_sent(sizes) == (there // ROW_BYTES, home // RETURN_BYTES)


@settings(max_examples=300)
@given(schedules())
def test_every_send_has_its_receive(case: tuple[Schedule, list[int]]) -> None:
    schedule, sizes = case
    planned = [plan_of(schedule, rank, sizes) for rank in range(schedule.size)]
    assert messages(planned, "send") == messages(planned, "receive")
    assert all(t.peer != rank for rank, transfers in enumerate(planned) for t in transfers)


@settings(max_examples=300)
@given(schedules())
def test_blocks_reach_those_that_need_them_and_are_moved_for_nobody_else(case: tuple[Schedule, list[int]]) -> None:
    schedule, _ = case
    ranks = range(schedule.size)
    held = {(rank, 0): rank for rank in ranks}
    parents: dict[tuple[int, int], tuple[int, int]] = {}
    for step in range(len(schedule.steps)):
        for rank in ranks:
            for move in schedule.moves(rank, step):
                if move.direction == "send":
                    assert held[rank, step] == move.source
                    held[move.peer, move.step] = move.source
                    parents[move.peer, move.step] = (rank, step)
    assert all(held[r, t] == schedule.source(r, t) for t, r in np.argwhere(schedule.needed).tolist() if t)
    # Every journey leads to a rank that works on the block.
    useful = {(r, t) for t, r in np.argwhere(schedule.needed).tolist()}
    for place in list(useful):
        while place in parents:
            place = parents[place]
            useful.add(place)
    assert {place for place in held if place[1]} <= useful
    assert all(schedule.needed[1:].any(axis=1))


@settings(max_examples=300)
@given(schedules())
def test_every_contribution_comes_home_once(case: tuple[Schedule, list[int]]) -> None:
    schedule, _ = case
    ranks = range(schedule.size)
    arriving: dict[tuple[int, int], list[int]] = {}
    home: dict[int, list[int]] = {}
    for step in range(1, len(schedule.steps)):
        for rank in ranks:
            total = arriving.pop((rank, step), []) + ([rank] if schedule.needed[step, rank] else [])
            for move in schedule.returns(rank, step):
                if (
                    move.direction == "send"
                    and move.peer == move.source
                    and not (
                        step + 1 < len(schedule.steps)
                        and schedule.carries(schedule.holder(move.source, step + 1), step + 1)
                    )
                ):
                    home[move.source] = total
                elif move.direction == "send":
                    arriving[move.peer, step + 1] = total
    assert not arriving
    for source in ranks:
        workers = [schedule.holder(source, t) for t in range(1, len(schedule.steps))]
        wanted = [r for t, r in enumerate(workers, start=1) if schedule.needed[t, r]]
        assert home.get(source, []) == wanted


def test_a_block_nobody_needs_is_never_sent_and_steps_nobody_needs_are_jumped() -> None:
    needs = np.eye(5, dtype=bool)
    assert ring_schedule(needs).steps == ring_schedule(needs, 1).steps and len(ring_schedule(needs).steps) == 1
    # Rank 4 reads the block of rank 1, three places on: one message, one step, and the sum goes home from there.
    needs[4, 1] = True
    planned = [plan_of(ring_schedule(needs), rank, [1, 10, 100, 1, 1]) for rank in range(5)]
    assert planned[1] == [Transfer("ring", "send", 4, 240), Transfer("ring-return", "receive", 4, 400)]
    assert planned[4] == [Transfer("ring", "receive", 1, 240), Transfer("ring-return", "send", 1, 400)]
    assert planned[0] == planned[2] == planned[3] == []


def test_a_full_ring_and_a_full_double_ring_move_every_block_once_to_every_rank() -> None:
    for size, width in ((6, 6), (6, 3), (6, 2), (8, 4), (4, 1)):
        schedule = ring_schedule(np.ones((size, size), dtype=bool), width)
        planned = [t for rank in range(size) for t in plan_of(schedule, rank, [1] * size) if t.direction == "send"]
        there = [t for t in planned if t.kind != "ring-return"]
        assert len(there) == len(planned) - len(there) == size * (size - 1)
        # Only the blocks that begin a turn leave their inner group: once per other group.
        assert sum(t.kind == "ring-crossing" for t in there) == (0 if width == size else size * (size // width - 1))


def block_of(seed: int, *key: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((seed, *key)) % 2**31)
    return torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64)


def ring_here(seed: int, rounds: int) -> int:
    """Random schedules on this world: what arrives, what comes home, and the ledger, against a naive gather."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = build_mesh(size, torch.device("cpu"), 60, 1).sequence if size > 1 else alone().sequence
    messages_posted = 0
    for number in range(rounds):
        rng = random.Random(seed + number)
        sizes = [rng.choice([0, 1, 2, 5, 13]) for _ in range(size)]
        share, widths = rng.random(), [w for w in range(1, size + 1) if size % w == 0]
        needs = np.array([[rng.random() < share for _ in range(size)] for _ in range(size)])
        schedule = ring_schedule(needs, rng.choice(widths))
        blocks = [block_of(seed, number, r, rows=sizes[r]) for r in range(size)]
        ledger = Ledger()
        homeward = Homeward(blocks[rank], sizes, schedule, group, ledger)
        for step, source, block in circulate(blocks[rank].clone(), sizes, schedule, group, ledger):
            assert source == schedule.source(rank, step)
            assert block is None or torch.equal(block, blocks[source])
            needed = bool(schedule.needed[step, rank])
            assert block is not None or not needed
            if step:
                homeward.add(step, block_of(seed, number, rank, source, rows=sizes[source]) if needed else None)
        arrived = homeward.arrived()
        helpers = [r for r in range(size) if needs[r, rank] and r != rank]
        assert (arrived is None) == (not helpers)
        if arrived is not None:
            wanted = sum(block_of(seed, number, helper, rank, rows=sizes[rank]) for helper in helpers)
            torch.testing.assert_close(arrived, wanted, rtol=0, atol=1e-14)
        assert ledger.transfers == planned_transfers(group, schedule, sizes, 48, 48)
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
