"""Layouts: every token on exactly one rank, evenly, with balanced causal work, at any length and any documents."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx.sequence.layout import LAYOUTS, Documents, Layout, Run, balanced, contiguous, striped, zigzag
from longctx.sequence.plan import AttentionPlan

lengths = st.one_of(st.integers(0, 70), st.integers(0, 2**40))
small = st.integers(0, 200)
degrees = st.integers(1, 16)
names = st.sampled_from(sorted(LAYOUTS))


def documents_of(length: int) -> st.SearchStrategy[Documents]:
    """One to three rows of up to ten documents."""
    starts = st.sets(st.integers(0, max(0, length - 1)), max_size=9).map(lambda extra: tuple(sorted({0, *extra})))
    return st.lists(starts, min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw: Any, lengths: st.SearchStrategy[int]) -> Layout:
    length = draw(lengths)
    return LAYOUTS[draw(names)](length, draw(degrees), draw(documents_of(length)))


def packed(rng: np.random.Generator, length: int, mean: float, sigma: float) -> tuple[int, ...]:
    """Starts of documents of lognormal lengths that fill a row."""
    starts, at = [], 0
    while at < length:
        starts.append(at)
        at += max(1, int(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))
    return tuple(starts)


def imbalance(layout: Layout, documents: Documents) -> float:
    """Largest over mean causal work of the ranks."""
    work = AttentionPlan(layout, layout, documents).work
    return max(work) * len(work) / sum(work)


@given(layouts(small))
def test_every_token_is_on_exactly_one_rank(layout: Layout) -> None:
    length, degree = layout.length, layout.degree
    held = np.concatenate([layout.indices(rank) for rank in range(degree)])
    assert degree == len(layout.sizes)
    assert sorted(held.tolist()) == list(range(length))
    assert [len(layout.indices(rank)) for rank in range(degree)] == list(layout.sizes)


@settings(deadline=None)
@given(layouts(lengths))
def test_runs_are_ascending_disjoint_and_maximal(layout: Layout) -> None:
    for runs in layout.runs:
        assert all(0 <= run.start < run.stop <= layout.length for run in runs)
        assert all((run.stop - 1 - run.start) % run.step == 0 for run in runs), "stop is one past the last token"
        # Strictly apart: neighbouring runs are one run.
        assert all(a.stop < b.start for a, b in pairwise(runs))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_a_run_is_a_range(start: int, size: int, step: int) -> None:
    run = Run(start, start + size, step)
    assert run.size == len(range(*run))
    assert Layout(100, ((run,),)).indices(0).tolist() == list(range(*run))


def test_few_runs_where_few_are_promised() -> None:
    for name, most in (("contiguous", 1), ("zigzag", 2), ("striped", 1)):
        assert all(len(runs) <= most for runs in LAYOUTS[name](1000, 7).runs)


@given(lengths, degrees)
@example(4, 7)
def test_shards_are_even(length: int, degree: int) -> None:
    sizes = contiguous(length, degree).sizes
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1
    # Two chunks per rank, each off by at most one token.
    sizes = zigzag(length, degree).sizes
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 2
    sizes = striped(length, degree).sizes
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1


@given(layouts(small), st.integers(0, 2**31))
def test_shard_then_unshard_is_the_identity(layout: Layout, seed: int) -> None:
    length, degree = layout.length, layout.degree
    x_S = np.random.default_rng(seed).permutation(length)
    shards = [x_S[layout.indices(rank)] for rank in range(degree)]
    back_S = np.full(length, -1)
    for rank, shard in enumerate(shards):
        back_S[layout.indices(rank)] = shard
    assert (back_S == x_S).all()


def causal_work(layout: Layout) -> tuple[int, ...]:
    """Query-key pairs of every rank, all tokens being one document."""
    return AttentionPlan(layout, layout, ((0,),)).work


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8))
def test_zigzag_gives_all_ranks_equal_causal_work(chunk: int, degree: int) -> None:
    length = 2 * degree * chunk
    layout = zigzag(length, degree)
    assert set(causal_work(layout)) == {length * (length + 1) // 2 // degree}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 8))
def test_zigzag_is_balanced_to_two_rows_at_any_length(length: int, degree: int) -> None:
    layout = zigzag(length, degree)
    work = causal_work(layout)
    assert sum(work) == length * (length + 1) // 2
    assert max(work) - min(work) <= 2 * length


def test_contiguous_is_not_balanced() -> None:
    layout = contiguous(64, 4)
    work = causal_work(layout)
    assert work == (136, 392, 648, 904)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_sequence_shorter_than_the_ranks_leaves_some_empty(name: str) -> None:
    layout = LAYOUTS[name](3, 5, ((0, 2),))
    assert sum(layout.sizes) == 3 and 0 in layout.sizes
    empty = layout.sizes.index(0)
    assert layout.runs[empty] == () and layout.indices(empty).shape == (0,) and layout.indices(empty).dtype == np.int64


def test_zigzag_pairs_first_and_last_chunk() -> None:
    assert zigzag(16, 2).runs == ((Run(0, 4), Run(12, 16)), (Run(4, 12),))
    assert contiguous(10, 3).runs == ((Run(0, 3),), (Run(3, 6),), (Run(6, 10),))


def test_striped_deals_tokens_in_turn() -> None:
    assert striped(10, 3).runs == ((Run(0, 10, 3),), (Run(1, 8, 3),), (Run(2, 9, 3),))
    assert striped(5, 1) == contiguous(5, 1) == balanced(5, 1, ((0, 2),))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 8))
def test_striped_is_balanced_to_one_query_a_rank(length: int, degree: int) -> None:
    work = causal_work(striped(length, degree))
    assert max(work) - min(work) <= length + length // degree + 1


@settings(deadline=None)
@given(st.data(), lengths, degrees)
def test_balanced_tokens_are_even_and_no_rank_is_left_out(data: st.DataObject, length: int, degree: int) -> None:
    layout = balanced(length, degree, data.draw(documents_of(length)))
    assert sum(layout.sizes) == length
    assert min(layout.sizes) > 0 or length < degree
    # Chunks are off by at most one token, and a rank has at most sqrt(S / P) of them (two if that is less).
    assert max(layout.sizes) - min(layout.sizes) <= max(2, int((length / degree) ** 0.5))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([4096, 5003, 16384]), st.integers(1, 8))
def test_balanced_work_is_even_for_any_documents(data: st.DataObject, length: int, degree: int) -> None:
    documents = data.draw(documents_of(length))
    assert imbalance(balanced(length, degree, documents), documents) <= 1.05


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_balanced_work_of_packed_documents_is_even(seed: int, sigma: float) -> None:
    rng = np.random.default_rng(seed)
    length, degree = 16384, 8
    for rows in (1,) * 40 + (3,) * 10:
        documents = tuple(packed(rng, length, length / 16, sigma) for _ in range(rows))
        layout = balanced(length, degree, documents)
        assert imbalance(layout, documents) <= 1.05
        assert max(layout.sizes) == min(layout.sizes) == length // degree


def test_other_layouts_leave_packed_documents_uneven(seed: int) -> None:
    """What balanced is for; and a planted fault: balanced for other documents than those packed."""
    rng = np.random.default_rng(seed)
    drawn = [(packed(rng, 16384, 1024, 1.0),) for _ in range(20)]
    for name in ("contiguous", "zigzag"):
        assert np.median([imbalance(LAYOUTS[name](16384, 8, d), d) for d in drawn]) > 1.2
    shifted = [imbalance(balanced(16384, 8, d), other) for d, other in pairwise(drawn)]
    assert max(shifted) > 1.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16))
def test_one_document_is_balanced_as_well_as_by_zigzag(chunk: int, degree: int) -> None:
    length = 2 * degree * chunk
    assert set(causal_work(balanced(length, degree, ((0,),)))) == set(causal_work(zigzag(length, degree)))


def test_balanced_cuts_no_finer_than_it_must() -> None:
    """One document gives zigzag, documents that are even as they lie stay on their ranks."""
    assert balanced(4096, 8, ((0,),)) == zigzag(4096, 8)
    assert balanced(4096, 8, (tuple(range(0, 4096, 64)),)) == contiguous(4096, 8)
    assert balanced(4096, 8) == contiguous(4096, 8)


def test_balanced_keeps_documents_on_few_ranks() -> None:
    """Documents of two ranks' size, unevenly long: most pairs of 64 ranks have nothing to send each other."""
    documents = (packed(np.random.default_rng(0), 2**16, 2**11, 0.7),)
    layout = balanced(2**16, 64, documents)
    assert imbalance(layout, documents) <= 1.05
    needed = AttentionPlan(layout, layout, documents).needed_pairs
    assert needed.mean() < 0.35


def test_every_rank_finds_the_same_balanced_layout(seed: int) -> None:
    documents = (packed(np.random.default_rng(seed), 5003, 300, 1.0),)
    assert balanced(5003, 7, documents) == balanced(5003, 7, documents)
    layout = balanced(5003, 7, documents)
    assert all(type(bound) is int for runs in layout.runs for run in runs for bound in run)


@pytest.mark.parametrize("mean", [2**16, 2000])
def test_a_million_tokens_are_balanced_over_1024_ranks(seed: int, mean: int) -> None:
    documents = (packed(np.random.default_rng(seed), 2**20, mean, 1.0),)
    layout = balanced(2**20, 1024, documents)
    assert imbalance(layout, documents) <= 1.05
