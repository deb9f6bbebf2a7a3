"""Merging partial results: any order and grouping gives the softmax over all keys; no NaN from -inf."""

import math
from itertools import pairwise
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longctx.attention.kernels import NAIVE, Scoring
from longctx.attention.merge import merge_

Part = tuple[Tensor, Tensor]
NOTHING = (torch.zeros(2, 1, 3, dtype=torch.float64), torch.full((2, 1), -math.inf, dtype=torch.float64))


def merged(a: Part, b: Part) -> Part:
    """A new partial result; the parts are left alone."""
    out, lse = a[0].clone(), a[1].clone()
    merge_(out, lse, *b)
    return out, lse


def assert_same(a: Part, b: Part) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(a[1], b[1], rtol=1e-12, atol=1e-12)


@st.composite
def parts(draw: Any) -> Part:
    """Random outputs; log-sum-exps from -700 to 700, or no key seen (then the output is 0)."""
    number = st.floats(-10, 10, allow_subnormal=False)
    out = torch.tensor(draw(st.lists(number, min_size=6, max_size=6)), dtype=torch.float64).view(2, 1, 3)
    scores = draw(st.lists(st.one_of(st.just(-math.inf), st.floats(-700, 700)), min_size=2, max_size=2))
    lse = torch.tensor(scores, dtype=torch.float64).view(2, 1)
    return out.masked_fill(lse.isneginf()[..., None], 0), lse


@settings(max_examples=150, deadline=None)
@given(parts(), parts())
@example(NOTHING, NOTHING)
def test_merging_commutes(a: Part, b: Part) -> None:
    assert_same(merged(a, b), merged(b, a))


@settings(max_examples=150, deadline=None)
@given(parts(), parts(), parts())
def test_merging_is_associative(a: Part, b: Part, c: Part) -> None:
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


@settings(max_examples=60, deadline=None)
@given(parts())
def test_nothing_is_neutral_to_the_bit(a: Part) -> None:
    for out, lse in (merged(a, NOTHING), merged(NOTHING, a)):
        assert torch.equal(out, a[0]) and torch.equal(lse, a[1])


def test_no_key_at_all_stays_zero_and_minus_infinity() -> None:
    out, lse = merged(NOTHING, NOTHING)
    assert torch.equal(out, NOTHING[0]) and torch.equal(lse, NOTHING[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_any_order_of_any_cut_is_the_softmax(seed: int, widths: list[int], order: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 2, 4, generator=generator, dtype=torch.float64) for n in (3, sum(widths), sum(widths)))
    scores = torch.einsum("nhe,mhe->nhm", 4 * q, k)
    wanted = torch.einsum("nhm,mhe->nhe", scores.softmax(-1), v), scores.logsumexp(-1)
    cuts = [sum(widths[:i]) for i in range(len(widths) + 1)]
    pieces = [slice(a, b) for a, b in pairwise(cuts)]
    order.shuffle(pieces)
    total: Part = (torch.zeros(3, 2, 4, dtype=torch.float64), torch.full((3, 2), -math.inf, dtype=torch.float64))
    for piece in pieces:
        total = merged(total, NAIVE.forward(4 * q, k[piece], v[piece], "full", Scoring(1.0)))
    assert_same(total, wanted)


def test_narrow_parts_are_merged_in_the_accumulators_precision() -> None:
    out, lse = torch.ones(1, 1, 1), torch.zeros(1, 1)
    for _ in range(1000):
        merge_(out, lse, torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16), torch.zeros(1, 1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.ones(1, 1, 1), rtol=1e-5, atol=0)
    torch.testing.assert_close(lse, torch.full((1, 1), math.log(1001)), rtol=1e-5, atol=0)
