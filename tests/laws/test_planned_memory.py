"""Law 7: what attention holds per rank is a stated formula: O(S / P), save where all keys are gathered.

Counted are the storages that operators return; what a kernel allocates inside itself does not show.

Legend: T local tokens, H query heads, K kv heads, E head dim, P ranks.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import Problem, context_of, groups_of
from pool import Pool

from longctx.attention import attention
from longctx.attention.kernels import CPU_FLASH
from longctx.attention.schemes import SCHEMES
from longctx.attention.ulysses import HeadShare
from longctx.bench.live_bytes import LiveBytes

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
QUERY, KEYS = HEADS * HEAD_DIM, 2 * KV_HEADS * HEAD_DIM


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank during a forward and backward."""

    peak: int
    largest: int
    tokens: int


WHOLE = replace(CPU_FLASH, strip=None, backward_tile=None)
"""Takes a triangle in one call, so that what it returns is as long as what it is given, at any length."""


def measure_here(problem: Problem, strips: bool = False) -> Measured:
    """Everything from the inputs on, as seen by this rank; ``strips``: with the kernel as it is, once it has masks."""
    (group,) = groups_of([problem])
    context = context_of(problem, group)
    context.plan()
    for _ in range(2 if strips else 1):
        watch = LiveBytes()
        with watch:
            q, k, v = (
                torch.randn(1, context.local_length, heads, HEAD_DIM, requires_grad=True)
                for heads in (problem.heads, problem.kv_heads, problem.kv_heads)
            )
            out = attention(q, k, v, context, kernel=CPU_FLASH if strips else WHOLE)
            out.backward(torch.randn(out.shape))
        del q, k, v, out
    return Measured(watch.peak, watch.largest, context.local_length)


def problem_of(length: int, scheme: str = "ring") -> Problem:
    return Problem(length, ((0,),), HEADS, KV_HEADS, HEAD_DIM, scheme=scheme, inner=2, dtype=torch.float32)


def formula(tokens: int) -> int:
    """Peak bytes of a forward and backward of one fp32 layer with ``tokens`` local tokens, on any number of ranks.

    Query side: q, out, dout, dq, the kernel's dq; lse and a copy. Key side (k and v together): the inputs, stacked for
    sending, the block in work, the one arriving, their gradients (own, in work, arriving, leaving), the kernel's.
    """
    return 4 * tokens * (5 * QUERY + 2 * HEADS + 9 * KEYS)


def assert_no_long_tensor(measured: Measured) -> None:
    assert measured.largest <= 4 * measured.tokens * max(QUERY, KEYS), measured


def assert_within_formula(measured: Measured) -> None:
    assert measured.peak <= formula(measured.tokens) + 256, (measured, formula(measured.tokens))


def test_peak_bytes_follow_the_formula_at_two_lengths(pool: Pool) -> None:
    for world in (1, 2, 3, 4):
        short, long = (pool.run(measure_here, world, problem_of(length * world)) for length in (128, 256))
        for one, two in zip(short, long, strict=True):
            for measured in (one, two):
                assert_no_long_tensor(measured)
                assert_within_formula(measured)
            assert two.peak == pytest.approx(2 * one.peak, rel=0.01)
        if world == 4:
            # The formula is what is really held, not a generous bound.
            assert max(m.peak for m in long) > 0.93 * formula(256)


def test_strips_hold_no_more(pool: Pool) -> None:
    """What comes of them is shorter; a square below them may hold its log-sum-exp once more."""
    for world in (1, 4):
        for tokens in (128, 700):
            for measured in pool.run(measure_here, world, problem_of(tokens * world), True):
                assert_no_long_tensor(measured)
                assert measured.peak <= formula(tokens) + 4 * tokens * HEADS


def test_more_ranks_hold_less_each(pool: Pool) -> None:
    two, four = (max(m.peak for m in pool.run(measure_here, world, problem_of(1024))) for world in (2, 4))
    assert four < 0.7 * two


@pytest.mark.tier2
def test_peak_bytes_do_not_grow_with_the_ranks(pool: Pool) -> None:
    for measured in pool.run(measure_here, 8, problem_of(8 * 128)):
        assert_no_long_tensor(measured)
        assert_within_formula(measured)


def formula_of(scheme: str, world: int, tokens: int) -> int:
    """Peak bytes of a rank under a scheme, in inner groups of two.

    A gather holds all keys and values four times: gathered, and as gradients by the kernel, summed, and laid out to be
    sent. An exchange holds q, k, v, out and dout of its tokens, and of its heads (a share of the query heads, and the
    kv heads these read) what attention holds: locally, or in the hybrid as a ring of two does. That is of k and v the
    inputs, their gradients, the block in work, its gradients and the kernel's, and what is stacked for sending: half of
    them on the outer rank that holds the end of the sequence, where nobody else needs the other half.
    """
    if scheme in ("ring", "double_ring"):
        return formula(tokens)
    if scheme == "allgather":
        return 4 * tokens * (5 * QUERY + 2 * HEADS + KEYS + 4 * world * KEYS)
    inner = world if scheme == "ulysses" else 2
    share = HeadShare.of(HEADS, KV_HEADS, inner)
    heads, kv_heads = (max(b - a for a, b in ranges) for ranges in (share.queries, share.keys))
    queries, keys = inner * heads * HEAD_DIM, inner * 2 * kv_heads * HEAD_DIM
    held = 3 if scheme == "ulysses" else 5.5
    return int(4 * tokens * (3 * QUERY + KEYS + 5 * queries + 6 * HEADS + held * keys))


def on_the_wire(scheme: str, world: int, tokens: int) -> int:
    """Bytes that gloo's own thread may hold a moment longer than the call that moves them: one message out and in."""
    if scheme in ("ring", "double_ring"):
        return 0
    return 2 * 4 * tokens * (world * KEYS if scheme == "allgather" else QUERY + 2 * KEYS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_follows_its_formula_at_two_lengths(pool: Pool, scheme: str) -> None:
    world = 4
    for tokens in (128, 256):
        found = pool.run(measure_here, world, problem_of(tokens * world, scheme))
        stated = formula_of(scheme, world, tokens)
        assert max(m.peak for m in found) <= stated + on_the_wire(scheme, world, tokens) + 256, (scheme, found)
        assert max(m.peak for m in found) > 0.8 * stated, (scheme, found)


def test_travelling_queries_follow_their_formula_at_two_lengths(pool: Pool) -> None:
    """Without grouped heads. Query side: q, out, dout, dq; what is sent, in work and arriving, each q and dout with two
    numbers per head; their copies and an out; dq of the block, of the kernel, leaving and arriving. Key side: k and v,
    their gradients, the block's and the kernel's."""
    keys = 2 * QUERY
    for tokens in (128, 256):
        stated = 4 * tokens * (11 * QUERY + 3 * (2 * QUERY + 2 * HEADS) + 4 * HEADS + 4 * keys)
        problem = replace(problem_of(4 * tokens), kv_heads=HEADS)
        peak = max(m.peak for m in pool.run(measure_here, 4, problem))
        assert 0.93 * stated < peak <= stated + 256


def test_only_rows_that_others_need_are_held_twice(pool: Pool) -> None:
    """Documents that each end in the middle of the next rank's tokens: half of the keys travel, one rank far.

    Of k and v: the inputs and their gradients; half of them stacked and half in work, its gradients and the kernel's.
    Query side as in the formula, with one more lse.
    """
    for tokens in (128, 256):
        starts = (0, *range(tokens // 2, 4 * tokens, tokens))
        problem = replace(problem_of(4 * tokens), documents=(starts,), layout="contiguous")
        stated = 4 * tokens * (5 * QUERY + 3 * HEADS + 4 * KEYS)
        peak = max(m.peak for m in pool.run(measure_here, 4, problem))
        assert 0.93 * stated < peak <= stated + 256


def test_gathering_all_keys_is_noticed(pool: Pool) -> None:
    for measured in pool.run(measure_here, 4, problem_of(1024, "allgather")):
        with pytest.raises(AssertionError):
            assert_no_long_tensor(measured)
        with pytest.raises(AssertionError):
            assert_within_formula(measured)


def test_the_measure_counts_what_lives_together() -> None:
    watch = LiveBytes()
    with watch:
        kept = torch.zeros(10)
        for _ in range(3):
            passing = kept + 1
            del passing
        view = kept[2:]
    assert (watch.peak, watch.largest, watch.live, view.numel()) == (80, 40, 40, 8)
