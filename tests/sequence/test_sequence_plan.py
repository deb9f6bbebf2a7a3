"""AttentionPlan against a brute-force mask: every visible query-key pair exactly once, nothing else, over all ranks."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan_cases import expected, painted, plans

from longctx.sequence.layout import LAYOUTS, Layout, Run, balanced, contiguous, striped, zigzag
from longctx.sequence.plan import AttentionPlan, Slice
from longctx.sequence.slices import band


def check(plan: AttentionPlan) -> None:
    """Slices, needs and work of every pair of ranks against the definition."""
    work = [0] * plan.queries.degree
    for rank in range(plan.queries.degree):
        for source in range(plan.keys.degree):
            wanted = expected(plan, rank, source)
            slices = plan.slices(rank, source)
            found = painted(slices, *wanted.shape)
            assert (found == wanted).all(), (rank, source, slices)
            assert sum(s.area for s in slices) == wanted.sum()
            assert plan.needed_pairs[rank, source] == bool(wanted.any()) == bool(slices)
            work[rank] += wanted.sum()
    if sum(plan.keys.sizes) == plan.keys.length:
        assert plan.work == tuple(work)


@settings(max_examples=250, deadline=None)
@given(plans())
@example(AttentionPlan(zigzag(7, 3), zigzag(7, 3), ((0, 1, 2, 3, 4, 5, 6), (0, 4)), True, 1))
@example(AttentionPlan(zigzag(1, 4), zigzag(1, 4), ((0,),), False, None))
@example(AttentionPlan(striped(11, 3), striped(11, 3), ((0, 1, 2, 7), (0, 4)), True, 4))
def test_slices_tile_the_visible_pairs_exactly_once(plan: AttentionPlan) -> None:
    check(plan)


@settings(max_examples=80, deadline=None)
@given(plans(cross=True))
@example(AttentionPlan(striped(19, 3), zigzag(19, 3), ((0, 5),), True, 6))
@example(AttentionPlan(zigzag(19, 3), striped(19, 3), ((0,),), False, 2))
def test_queries_and_keys_may_have_different_layouts(plan: AttentionPlan) -> None:
    check(plan)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.one_of(st.none(), st.integers(1, 9)))
@example(40, 4, 3, True, 5)
def test_stripes_of_different_steps(length: int, ours: int, theirs: int, causal: bool, window: int | None) -> None:
    documents = ((0, length // 3) if length > 2 else (0,),)
    check(AttentionPlan(striped(length, ours), striped(length, theirs), documents, causal, window))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 9), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 12)), st.booleans()
)
def test_new_tokens_see_the_past(past: int, new: int, batch: int, window: int | None, causal: bool) -> None:
    length = past + new
    plan = AttentionPlan(
        Layout(length, ((Run(past, length),),)), contiguous(length, 1), ((0,),) * batch, causal, window
    )
    check(plan)
    if causal:
        assert sum(s.area for s in plan.slices(0, 0)) == batch * sum(
            min(q + 1, window or length) for q in range(past, length)
        )


def causal_pairs(starts: tuple[int, ...], length: int, window: int | None) -> int:
    """Pairs of one row by the formula."""
    total = 0
    for start, stop in zip(starts, (*starts[1:], length), strict=True):
        reach = min(stop - start, window or length)
        total += reach * (reach + 1) // 2 + (stop - start - reach) * reach
    return total


@pytest.mark.parametrize("name", ["zigzag", "balanced"])
@pytest.mark.parametrize("document_length", [None, 5000])
@pytest.mark.parametrize("window", [None, 4096])
def test_a_million_tokens_are_planned_exactly_in_few_slices(
    name: str, window: int | None, document_length: int | None
) -> None:
    length, degree = 2**20 + 3, 8
    starts = tuple(range(0, length, document_length or length))
    layout = LAYOUTS[name](length, degree, (starts,))
    plan = AttentionPlan(layout, layout, (starts,), True, window)
    slices = [s for rank in range(degree) for source in range(degree) for s in plan.slices(rank, source)]
    assert sum(s.area for s in slices) == causal_pairs(starts, length, window) == sum(plan.work)
    # Two triangles a window, and a few corners for every document and chunk that is cut.
    runs = max(map(len, layout.runs))
    assert len(slices) <= 3 * (length // (window or length) + 1) + 6 * (len(starts) + runs * degree * degree)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
@pytest.mark.parametrize("window", [None, 4096])
def test_work_and_blocks_of_1024_ranks_are_planned_without_a_slice(name: str, window: int | None) -> None:
    """What a simulation of a cluster asks for: no slice is made."""
    length, degree = 2**20, 1024
    starts = (0, 70_001, 300_000, 300_700, 900_000)
    layout = LAYOUTS[name](length, degree, (starts,))
    plan = AttentionPlan(layout, layout, (starts,), True, window)
    work, needed = plan.work, plan.needed_pairs
    assert sum(work) == causal_pairs(starts, length, window)
    assert needed.shape == (degree, degree) and needed.diagonal().all()
    for rank, source in np.random.default_rng(0).integers(degree, size=(20, 2)).tolist():
        assert plan.needed_pairs[rank, source] == bool(plan.slices(rank, source))


def test_work_needs_all_keys() -> None:
    plan = AttentionPlan(contiguous(8, 2), Layout(8, ((Run(0, 4),),)), ((0,),))
    with pytest.raises(ValueError, match="hold 4 of 8 tokens"):
        _ = plan.work


@pytest.mark.parametrize("causal", [True, False])
def test_the_needed_pairs_cannot_be_changed(causal: bool) -> None:
    plan = AttentionPlan(zigzag(8, 2), zigzag(8, 2), ((0,),), causal)
    with pytest.raises(ValueError, match="read-only"):
        plan.needed_pairs[0, 0] = False


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 9), st.booleans())
def test_a_striped_hop_is_one_triangle(length: int, degree: int, causal: bool) -> None:
    """And a row more where the query rank holds one token more; without causality it is one rectangle."""
    layout = striped(length, degree)
    plan = AttentionPlan(layout, layout, ((0,),), causal)
    for rank in range(degree):
        for source in range(degree):
            slices = plan.slices(rank, source)
            assert len(slices) <= (2 if causal else 1)
            assert not causal or sum(s.mask == "full" and s.area > layout.sizes[source] for s in slices) == 0


def test_a_striped_triangle_is_shifted_for_earlier_ranks() -> None:
    """Token i of rank 0 comes before token i of rank 1, so it does not see it."""
    plan = AttentionPlan(striped(12, 2), striped(12, 2), ((0,),))
    assert plan.slices(1, 0) == (Slice(0, 6, 0, 6, "causal"),)
    assert plan.slices(0, 1) == (Slice(1, 6, 0, 5, "causal"),)


def test_one_document_balanced_in_many_chunks_stays_a_staircase() -> None:
    """Rectangles of neighbouring chunks are joined: slices grow with the chunks, not with their square."""
    length, starts = 2**14, (0, 9_000, 9_900, 13_000)
    layout = balanced(length, 8, (starts,))
    runs = max(map(len, layout.runs))
    assert runs > 2
    plan = AttentionPlan(layout, layout, (starts,))
    assert max(len(plan.slices(rank, source)) for rank in range(8) for source in range(8)) <= 3 * runs


def test_causal_zigzag_needs_at_most_three_slices_a_hop() -> None:
    layout = zigzag(8 * 6, 3)
    plan = AttentionPlan(layout, layout, ((0,),))
    counts = {(rank, source): len(plan.slices(rank, source)) for rank in range(3) for source in range(3)}
    assert max(counts.values()) <= 3
    assert all(counts[rank, source] <= 2 for rank in range(3) for source in range(3) if rank != source)


bounds = st.one_of(st.none(), st.integers(-60, 60))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 30), st.integers(0, 20), st.integers(0, 30), st.integers(0, 20), bounds, bounds)
@example(0, 6, 0, 5, 1, None)
@example(3, 9, 0, 20, 2, 2)
@example(0, 9, 0, 9, 3, 1)
def test_band_of_any_two_runs(qa: int, rows: int, ka: int, columns: int, lo: int | None, hi: int | None) -> None:
    q, k = np.ogrid[:60, :60]
    wanted = (q >= qa) & (q < qa + rows) & (k >= ka) & (k < ka + columns)
    if lo is not None:
        wanted &= q - k >= lo
    if hi is not None:
        wanted &= q - k <= hi
    assert (painted(tuple(band(qa, qa + rows, ka, ka + columns, lo, hi)), 60, 60) == wanted).all()


def test_a_band_off_by_one_is_noticed() -> None:
    """A planted fault: a strictly lower triangle painted as one that holds its diagonal."""
    plan = AttentionPlan(striped(12, 2), striped(12, 2), ((0,),))
    wrong = (Slice(0, 6, 0, 6, "causal"),)
    assert (painted(plan.slices(0, 1), 6, 6) == expected(plan, 0, 1)).all()
    assert not (painted(wrong, 6, 6) == expected(plan, 0, 1)).all()
