"""What a step of a recurrence holds: law 7 over segments.

The losses of all segments are summed before one backward, so a step holds the graph of every segment, truncated or not:
O(S / P). What truncation bounds is how much of that graph the gradient of one segment needs.

Strategy: peak bytes of a forward and backward at three numbers of segments, on one rank and on two; and the bytes that
the backward of the last segment alone sets free, where without truncation all segments before it take part.
"""

from typing import Any

import pytest
import torch
from pool import Pool
from test_recurrence import KINDS, Case, group_here

from longctx.bench.live_bytes import LiveBytes
from longctx.recurrence import KINDS as RECURRENCES

SEGMENT, MEMORY, FP64 = 32, 2, 8
COUNTS = (4, 6, 8)
EVERY = pytest.mark.parametrize("changes", [{"kind": "rmt"}, {"kind": "armt"}, {"kind": "armt", "wavefront": True}])


def case_of(segments: int, **changes: Any) -> Case:
    return Case(**changes, length=SEGMENT * segments, segment=SEGMENT, memory=MEMORY, documents=((0,),))


def peak_here(case: Case) -> int:
    """Most bytes this rank holds at once in a forward and backward; collective."""
    model, context, tokens = case.model(), case.context(group_here()), case.tokens()
    batch = context.shard(tokens), context, context.shard(tokens.roll(-1, 1))

    def step() -> None:
        model(*batch, loss_chunk=8).loss_sum.backward()

    step()  # plans, tables and the gradients of parameters are made once
    with LiveBytes() as live:
        step()
    return live.peak


def per_segment(pool: Pool, world: int, changes: dict[str, Any]) -> float:
    """Bytes that a further segment costs the rank that holds the most: the same for any number of them."""
    few, some, many = (max(pool.run(peak_here, world, case_of(count, **changes))) for count in COUNTS)
    assert many - some == pytest.approx(some - few, rel=0.02)
    return (many - few) / (COUNTS[-1] - COUNTS[0])


@EVERY
def test_two_ranks_hold_half_of_each_segment(changes: dict[str, Any], pool: Pool) -> None:
    """Beside its share of the rows (one rank has all memory tokens), a rank holds no more than what is handed on.

    In a wavefront two ranks hold whole segments in turn, and what travels.
    """
    case = case_of(1, **changes)
    one, two = (per_segment(pool, world, changes) for world in (1, 2))
    recurrence = RECURRENCES[case.kind]
    beside = recurrence.rows_beside(case.config.recurrence)
    share = 1 / 2 if case.wavefront else (SEGMENT / 2 + beside) / (SEGMENT + beside)
    assert one / 2 <= two <= share * one + FP64 * recurrence.carried_size(case.config)


@KINDS
def test_recomputation_holds_less_of_each_segment(kind: str) -> None:
    plain, recomputed = (
        [peak_here(case_of(count, kind=kind, recompute=recompute)) for count in COUNTS] for recompute in (False, True)
    )
    assert recomputed[-1] - recomputed[0] < 0.6 * (plain[-1] - plain[0])


def freed_by_the_last(case: Case) -> int:
    """Bytes of the graph that the backward of the last segment's hidden states goes through."""
    model, context, tokens, outputs = case.model(), case.context(group_here()), case.tokens(), []
    owner, name = (model.decoder, "run") if case.kind == "rmt" else (model, "_segment")
    run = getattr(owner, name)

    def watched(*arguments: Any) -> Any:
        found = run(*arguments)
        outputs.append(found[0])
        return found

    setattr(owner, name, watched)
    with LiveBytes() as live:
        hidden_BTD = model(tokens, context).hidden_BTD
        held = live.live
        torch.autograd.grad(outputs[-1].sum(), list(model.parameters()), allow_unused=True)
        assert hidden_BTD.requires_grad  # the graph of the others lives
        return held - live.live


@KINDS
def test_truncation_bounds_what_a_segment_needs(kind: str) -> None:
    """The same, whatever the number of segments; without truncation, as much of each."""
    for bptt in (0, 1):
        few, many = (freed_by_the_last(case_of(count, kind=kind, bptt=bptt)) for count in (4, 8))
        assert many == few > 0
    few, many = (freed_by_the_last(case_of(count, kind=kind)) for count in (4, 8))
    assert many == pytest.approx(2 * few, rel=0.05)
