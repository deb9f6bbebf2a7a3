"""AttentionPlan against a brute-force mask: every visible query-key pair exactly once, nothing else, over all ranks."""

import time
from typing import Any

import numpy as np
import pytest
from attention_cases import visible
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx.sequence.layout import LAYOUTS, Layout, contiguous, zigzag
from longctx.sequence.plan import AttentionPlan, Documents, Slice, band


@st.composite
def plans(draw: Any, cross: bool = False) -> AttentionPlan:
    length, degree = draw(st.integers(1, 26)), draw(st.integers(1, 5))
    starts = st.sets(st.integers(0, length - 1), max_size=6).map(lambda extra: tuple(sorted({0, *extra})))
    documents: Documents = tuple(draw(st.lists(starts, min_size=1, max_size=3)))
    window = draw(st.one_of(st.none(), st.integers(1, length + 2)))
    queries, keys = (LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](length, degree) for _ in range(2))
    return AttentionPlan(queries if cross else keys, keys, documents, draw(st.booleans()), window)


def painted(slices: tuple[Slice, ...], rows: int, columns: int) -> np.ndarray:
    """How often each pair of local query and key is computed."""
    count = np.zeros((rows, columns), dtype=int)
    for s in slices:
        height, width = s.q_end - s.q_start, s.k_end - s.k_start
        assert 0 <= s.q_start < s.q_end <= rows and 0 <= s.k_start < s.k_end <= columns, s
        block = np.ones((height, width), dtype=int)
        if s.mask != "full":
            assert height == width, s
            block = np.tril(block) if s.mask == "causal" else np.triu(block)
        count[s.q_start : s.q_end, s.k_start : s.k_end] += block
    return count


def expected(plan: AttentionPlan, rank: int, source: int) -> np.ndarray:
    """The same from the definition; rows of the batch never see each other."""
    rows, columns = plan.queries.sizes[rank], plan.keys.sizes[source]
    whole = np.zeros((len(plan.documents) * rows, len(plan.documents) * columns), dtype=int)
    index = np.ix_(plan.queries.indices(rank), plan.keys.indices(source))
    for b, starts in enumerate(plan.documents):
        seen = visible(starts, plan.queries.length, plan.causal, plan.window)
        whole[b * rows : (b + 1) * rows, b * columns : (b + 1) * columns] = seen[index]
    return whole


def check(plan: AttentionPlan) -> None:
    for rank in range(plan.queries.degree):
        for source in range(plan.keys.degree):
            wanted = expected(plan, rank, source)
            slices = plan.slices(rank, source)
            found = painted(slices, *wanted.shape)
            assert (found == wanted).all(), (rank, source, slices)
            assert sum(s.area for s in slices) == wanted.sum()
            assert plan.needs(rank, source) == bool(wanted.any()) == bool(slices)
            assert plan.needed_pairs()[rank, source] == bool(slices)


@settings(max_examples=250, deadline=None)
@given(plans())
@example(AttentionPlan(zigzag(7, 3), zigzag(7, 3), ((0, 1, 2, 3, 4, 5, 6), (0, 4)), True, 1))
@example(AttentionPlan(zigzag(1, 4), zigzag(1, 4), ((0,),), False, None))
def test_slices_tile_the_visible_pairs_exactly_once(plan: AttentionPlan) -> None:
    check(plan)


@settings(max_examples=80, deadline=None)
@given(plans(cross=True))
def test_queries_and_keys_may_have_different_layouts(plan: AttentionPlan) -> None:
    check(plan)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 9), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 12)), st.booleans()
)
def test_new_tokens_see_the_past(past: int, new: int, batch: int, window: int | None, causal: bool) -> None:
    length = past + new
    plan = AttentionPlan(Layout(length, (((past, length),),)), contiguous(length, 1), ((0,),) * batch, causal, window)
    check(plan)
    if causal:
        assert sum(s.area for s in plan.slices(0, 0)) == batch * sum(
            min(q + 1, window or length) for q in range(past, length)
        )


@pytest.mark.parametrize("document_length", [None, 5000])
@pytest.mark.parametrize("window", [None, 4096])
def test_a_million_tokens_are_planned_exactly_and_fast(window: int | None, document_length: int | None) -> None:
    length, degree = 2**20 + 3, 8
    starts = tuple(range(0, length, document_length or length))
    layout = zigzag(length, degree)
    began = time.perf_counter()
    plan = AttentionPlan(layout, layout, (starts,), True, window)
    slices = [s for rank in range(degree) for source in range(degree) for s in plan.slices(rank, source)]
    seconds = time.perf_counter() - began
    wanted = 0
    for start, stop in zip(starts, (*starts[1:], length), strict=True):
        reach = min(stop - start, window or length)
        wanted += reach * (reach + 1) // 2 + (stop - start - reach) * reach
    assert sum(s.area for s in slices) == wanted
    # Two triangles a window, and a few corners for every document and chunk that is cut.
    assert len(slices) <= 3 * (length // (window or length) + 1) + 6 * (len(starts) + 2 * degree * degree)
    assert seconds < 5


def test_causal_zigzag_needs_at_most_three_slices_a_hop() -> None:
    layout = zigzag(8 * 6, 3)
    plan = AttentionPlan(layout, layout, ((0,),))
    counts = {(rank, source): len(plan.slices(rank, source)) for rank in range(3) for source in range(3)}
    assert max(counts.values()) <= 3
    assert all(counts[rank, source] <= 2 for rank in range(3) for source in range(3) if rank != source)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 30), st.integers(0, 20), st.integers(0, 30), st.integers(0, 20), st.booleans(),
    st.one_of(st.none(), st.integers(1, 25)),
)  # fmt: skip
def test_band_of_any_two_runs(qa: int, rows: int, ka: int, columns: int, causal: bool, window: int | None) -> None:
    seen = visible((0,), 60, causal, window)
    wanted = np.zeros((60, 60), dtype=int)
    wanted[qa : qa + rows, ka : ka + columns] = seen[qa : qa + rows, ka : ka + columns]
    assert (painted(tuple(band(qa, qa + rows, ka, ka + columns, causal, window)), 60, 60) == wanted).all()
