"""Parts of blocks that travel, against a brute-force mask: the rows that other ranks need, and the work on them alone.

Exact but where tokens of a piece lie further apart than the stretch that one of them reaches; there nothing is missed.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from layout_cases import layouts
from plan_cases import expected, painted, plans

from longctx.sequence.layout import LAYOUTS, Layout, Run, contiguous, striped, zigzag
from longctx.sequence.parts import Part
from longctx.sequence.plan import AttentionPlan, Side

SIDES: tuple[Side, ...] = ("keys", "queries")
Masks = Callable[[int, int], np.ndarray]


def rows_of(part: Part) -> np.ndarray:
    """bool [total]."""
    found = np.zeros(part.total, dtype=bool)
    for start, stop in part.ranges:
        assert start < stop and not found[start - 1 : stop + 1].any(), "ranges ascend and do not touch"
        found[start:stop] = True
    return found


def needed(plan: AttentionPlan, side: Side, rank: int, mask: Masks) -> np.ndarray:
    """From the definition: which rows of a rank any other rank sees, or sees any key of."""
    own = plan.keys if side == "keys" else plan.queries
    found = np.zeros(len(plan.documents) * own.sizes[rank], dtype=bool)
    for other in range(plan.degree):
        if other != rank:
            found |= mask(other, rank).any(0) if side == "keys" else mask(rank, other).any(1)
    return found


def exact(plan: AttentionPlan, side: Side) -> bool:
    """Whether no token of the other side lies further from the next one than it reaches."""
    others = plan.queries if side == "keys" else plan.keys
    if plan.window is None:
        return True
    reach = plan.window if plan.causal else 2 * plan.window - 1
    return all(run.step <= reach for runs in others.runs for run in runs)


def check(plan: AttentionPlan) -> None:
    """The parts of all ranks, and all work on them in rows of the parts."""
    masks = {(rank, source): expected(plan, rank, source) for rank, source in np.ndindex(plan.degree, plan.degree)}
    for side in SIDES:
        parts = plan.key_parts if side == "keys" else plan.query_parts
        for rank, part in enumerate(parts):
            found, wanted = rows_of(part), needed(plan, side, rank, lambda *pair: masks[pair])
            assert (found == wanted).all() if exact(plan, side) else (found >= wanted).all(), (side, rank, part)
            assert [part.place(row) for row in np.flatnonzero(found).tolist()] == list(range(part.size))
            assert part.whole == bool(found.all())
    for (rank, source), mask in masks.items():
        if rank != source:
            columns = rows_of(plan.key_parts[source])
            rows = rows_of(plan.query_parts[rank])
            wanted = mask[:, columns]
            assert (painted(plan.visiting(rank, source, "keys"), *wanted.shape) == wanted).all()
            wanted = mask[rows]
            assert (painted(plan.visiting(rank, source, "queries"), *wanted.shape) == wanted).all()


@settings(max_examples=250, deadline=None)
@given(plans())
@example(AttentionPlan(zigzag(24, 3), zigzag(24, 3), ((0,), (0, 5)), True, None))
@example(AttentionPlan(zigzag(24, 3), zigzag(24, 3), ((0,), (0, 20)), False, None))
@example(AttentionPlan(striped(23, 4), striped(23, 4), ((0, 9),), True, 2))
@example(AttentionPlan(striped(23, 4), striped(23, 4), ((0, 9),), False, 2))
@example(AttentionPlan(contiguous(23, 4), contiguous(23, 4), ((0, 9),), True, 3))
def test_what_travels_is_what_another_rank_needs(plan: AttentionPlan) -> None:
    check(plan)


@settings(max_examples=80, deadline=None)
@given(plans(cross=True))
@example(AttentionPlan(contiguous(12, 2), Layout(12, ((), (Run(9, 12),))), ((0, 4, 9),)))
@example(AttentionPlan(contiguous(12, 2), Layout(12, ((Run(9, 12),), ())), ((0, 4, 9), (0,)), False, 2))
def test_queries_and_keys_may_have_different_layouts(plan: AttentionPlan) -> None:
    check(plan)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_runs_in_any_order_and_empty_ranks(seed: int, world: int, causal: bool, window: int | None) -> None:
    for layout in layouts(world, seed):
        check(AttentionPlan(layout, layout, ((0,), (0, layout.length // 2)), causal, window))


def test_a_window_misses_nothing_where_steps_are_longer() -> None:
    """Ranks of 5 hold every fifth token and a token sees itself and one more."""
    plan = AttentionPlan(striped(40, 5), striped(40, 5), ((0, 13),), True, 2)
    assert not exact(plan, "keys")
    check(plan)
    # All but the last key of a document, and all but the first query.
    assert [part.size for part in plan.key_parts] == [8, 8, 7, 8, 7]


def test_documents_on_one_rank_stay_there() -> None:
    layout = contiguous(24, 2)
    inside = AttentionPlan(layout, layout, ((0, 4, 12, 20),))
    assert [part.ranges for part in (*inside.key_parts, *inside.query_parts)] == [()] * 4
    across = AttentionPlan(layout, layout, ((0, 4, 9, 17), (0,)))
    assert [part.ranges for part in across.key_parts] == [((9, 24),), ()]
    assert [part.ranges for part in across.query_parts] == [(), ((0, 5), (12, 24))]


def test_nobody_needs_the_last_keys_of_a_zigzag_nor_its_first_queries() -> None:
    plan = AttentionPlan(zigzag(48, 4), zigzag(48, 4), ((0,),))
    assert [part.ranges for part in plan.key_parts] == [((0, 6),), *[((0, 12),)] * 3]
    assert [part.ranges for part in plan.query_parts] == [((6, 12),), *[((0, 12),)] * 3]


def test_one_rank_needs_nothing_sent() -> None:
    plan = AttentionPlan(contiguous(9, 1), contiguous(9, 1), ((0, 4),))
    assert plan.key_parts == plan.query_parts == (Part((), 9),)


def test_found_once_and_the_work_is_shared() -> None:
    plan = AttentionPlan(zigzag(48, 4), zigzag(48, 4), ((0,),))
    assert plan.key_parts is plan.key_parts
    assert plan.visiting(3, 0, "keys") is plan.visiting(3, 0, "keys")
    # Where all rows travel the work is the same, too.
    assert plan.visiting(3, 1, "keys") is plan.slices(3, 1)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("window", [None, 4096])
def test_parts_of_1024_ranks_are_found_without_a_slice(seed: int, name: str, window: int | None) -> None:
    length, degree = 2**20, 1024
    starts = (0, 70_001, 300_000, 300_700, 900_000)
    layout = LAYOUTS[name](length, degree, (starts,))
    plan = AttentionPlan(layout, layout, (starts,), True, window)

    def refuse(*args: Any) -> None:
        raise AssertionError("a slice was made")

    with patch.object(AttentionPlan, "_uncoalesced", refuse):
        parts = plan.key_parts
    source = int(np.random.default_rng(seed).integers(degree))
    wanted = np.zeros(parts[source].total, dtype=bool)
    for rank in range(degree):
        for s in plan.slices(rank, source) if rank != source else ():
            wanted[s.k_start : s.k_end] = True
    assert (rows_of(parts[source]) == wanted).all()
