"""Layouts: every token on exactly one rank, evenly, with balanced causal work, at any length."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx.sequence.layout import LAYOUTS, contiguous, zigzag
from longctx.sequence.plan import AttentionPlan

lengths = st.one_of(st.integers(0, 70), st.integers(0, 2**40))
small = st.integers(0, 200)
degrees = st.integers(1, 16)
names = st.sampled_from(sorted(LAYOUTS))


@given(names, small, degrees)
def test_every_token_is_on_exactly_one_rank(name: str, length: int, degree: int) -> None:
    layout = LAYOUTS[name](length, degree)
    held = np.concatenate([layout.indices(rank) for rank in range(degree)])
    assert layout.length == length and layout.degree == degree == len(layout.sizes)
    assert sorted(held.tolist()) == list(range(length))
    assert [len(layout.indices(rank)) for rank in range(degree)] == list(layout.sizes)


@given(names, lengths, degrees)
def test_runs_are_ascending_disjoint_and_maximal(name: str, length: int, degree: int) -> None:
    for runs in LAYOUTS[name](length, degree).runs:
        assert len(runs) <= 2
        assert all(0 <= start < stop <= length for start, stop in runs)
        # Strictly apart: neighbouring runs are one run.
        assert all(a[1] < b[0] for a, b in pairwise(runs))


@given(lengths, degrees)
@example(4, 7)
def test_shards_are_even(length: int, degree: int) -> None:
    sizes = contiguous(length, degree).sizes
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1
    # Two chunks per rank, each off by at most one token.
    sizes = zigzag(length, degree).sizes
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 2


@given(names, small, degrees, st.integers(0, 2**31))
def test_shard_then_unshard_is_the_identity(name: str, length: int, degree: int, seed: int) -> None:
    layout = LAYOUTS[name](length, degree)
    x_S = np.random.default_rng(seed).permutation(length)
    shards = [x_S[layout.indices(rank)] for rank in range(degree)]
    back_S = np.full(length, -1)
    for rank, shard in enumerate(shards):
        back_S[layout.indices(rank)] = shard
    assert (back_S == x_S).all()


def causal_work(plan: AttentionPlan) -> list[int]:
    """Query-key pairs of every rank."""
    ranks = range(plan.degree)
    return [sum(s.area for source in ranks for s in plan.slices(rank, source)) for rank in ranks]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8))
def test_zigzag_gives_all_ranks_equal_causal_work(chunk: int, degree: int) -> None:
    length = 2 * degree * chunk
    layout = zigzag(length, degree)
    assert set(causal_work(AttentionPlan(layout, layout, ((0,),)))) == {length * (length + 1) // 2 // degree}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 8))
def test_zigzag_is_balanced_to_two_rows_at_any_length(length: int, degree: int) -> None:
    layout = zigzag(length, degree)
    work = causal_work(AttentionPlan(layout, layout, ((0,),)))
    assert sum(work) == length * (length + 1) // 2
    assert max(work) - min(work) <= 2 * length


def test_contiguous_is_not_balanced() -> None:
    layout = contiguous(64, 4)
    work = causal_work(AttentionPlan(layout, layout, ((0,),)))
    assert work == [136, 392, 648, 904]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_sequence_shorter_than_the_ranks_leaves_some_empty(name: str) -> None:
    layout = LAYOUTS[name](3, 5)
    assert sum(layout.sizes) == 3 and 0 in layout.sizes
    empty = layout.sizes.index(0)
    assert layout.runs[empty] == () and layout.indices(empty).shape == (0,) and layout.indices(empty).dtype == np.int64


def test_zigzag_pairs_first_and_last_chunk() -> None:
    assert zigzag(16, 2).runs == (((0, 4), (12, 16)), ((4, 12),))
    assert contiguous(10, 3).runs == (((0, 3),), ((3, 6),), ((6, 10),))
