"""A rank's own work: cut or grouped, it is the same work; and it holds little beside its operands and results."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from attention_cases import random_documents
from torch import Tensor
from varlen_cases import FLASH_VARLEN, NAIVE_VARLEN

from longctx.attention import attention, cutting
from longctx.attention.cutting import Cut, cuts
from longctx.attention.kernels import CPU_FLASH, NAIVE, Kernel, Scoring
from longctx.attention.local import Partial, gradients
from longctx.attention.steps import Blocks, Rows, Step, groups, steps_of
from longctx.attention.sums import Sums
from longctx.bench.live_bytes import LiveBytes
from longctx.bench.virtual_ring import VirtualRing, cut
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import AttentionPlan, Mask, Slice

WHOLE = replace(NAIVE, tile=None)
SMALL_FLASH = replace(CPU_FLASH, tile=(256, 256), backward_tile=None, strip=(32, 64))
STRIPS = (None, (1, 1), (1, 3), (2, 4), (3, 3), (4, 12), (30, 60))
MASKS: tuple[Mask, ...] = ("full", "causal", "anticausal")


def random_plan(rng: random.Random) -> AttentionPlan:
    """Documents, windows, both layouts, one to four ranks."""
    length, degree = rng.choice([5, 16, 29, 47, 61]), rng.choice([1, 2, 3, 4])
    layout = LAYOUTS[rng.choice(["zigzag", "contiguous"])](length, degree)
    documents = random_documents(rng, rng.choice([1, 2, 3]), length)
    return AttentionPlan(layout, layout, documents, rng.random() < 0.7, rng.choice([None, None, 1, 2, 5, 13]))


def random_slice(rng: random.Random, longest: int) -> Slice:
    q, k, rows = rng.randrange(4), rng.randrange(4), rng.randrange(1, longest)
    mask = rng.choice(MASKS)
    return Slice(q, q + rows, k, k + (rng.randrange(1, longest) if mask == "full" else rows), mask)


def visible(s: Slice) -> np.ndarray:
    """How often each query-key pair is in the slice, [rows, keys]."""
    return computed([Cut(s.q_start, s.k_start, s.q_end - s.q_start, s.k_end - s.k_start, s.mask)])


def computed(found: Sequence[Cut]) -> np.ndarray:
    """How often each pair is computed and seen; a causal block's last row sees all its keys."""
    counts = np.zeros((64, 64), dtype=int)
    for p in found:
        row, column = np.indices((p.rows, p.columns))
        ahead = p.columns - p.rows
        seen = {"full": row >= 0, "causal": column <= row + ahead, "anticausal": column >= row}[p.mask]
        for start in range(0, p.number * p.stride or 1, p.stride or 1):
            counts[p.q + start : p.q + start + p.rows, p.k + start : p.k + start + p.columns] += seen
    return counts


def slices_of(step: Step) -> list[Slice]:
    """The blocks of one call."""
    blocks = zip(step.rows.ranges, step.columns.ranges, strict=True)
    return [Slice(*rows, *columns, step.mask) for rows, columns in blocks]


def test_cutting_computes_the_same_pairs_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        monkeypatch.setattr(cutting, "SPAN", rng.choice([1, 7, 12, 2048]))
        s, strip, most = random_slice(rng, 56), rng.choice(STRIPS), rng.choice([None, 1, 5, 17])
        found = list(cuts(s, strip, None if strip and most and most < strip[1] else most and (most, most)))
        assert np.array_equal(computed(found), visible(s)), (s, strip)
        if strip is None:
            assert most is None or all(max(p.rows, p.columns) <= most for p in found)
        elif s.mask != "full":
            rows = s.q_end - s.q_start
            work = sum(p.number * p.rows * p.columns for p in found)
            assert work <= rows * (rows + 1) // 2 + rows * (strip[0] - 1) // 2, (s, strip)
            assert all(p.mask == "full" or (p.rows <= strip[0] and p.columns <= strip[1]) for p in found)


def test_keys_are_cut_within_the_tile_of_a_backward(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        s = Slice(0, rng.randrange(1, 3000), 5, 5 + rng.randrange(1, 3000), "full")
        found = list(cuts(s, (32, 224), (2048, 448)))
        assert sum(p.rows * p.columns for p in found) == s.area
        assert {(p.q, p.k) for p in found} == {(q, k) for q in {p.q for p in found} for k in {p.k for p in found}}
        assert all(p.rows <= 2048 and p.columns <= 448 for p in found)
        assert len({p.k for p in found}) <= -(-(s.k_end - 5) // 448) + 1


def test_equal_blocks_are_one_call_of_views() -> None:
    layout = LAYOUTS["contiguous"](7 * 224 + 40, 1)
    steps = steps_of(AttentionPlan(layout, layout, ((0,),)).slices(0, 0), CPU_FLASH)
    strips = [step for step in steps if step.mask == "causal" and len(step.rows.ranges) > 1]
    assert [len(step.rows.ranges) for step in strips] == [7] * 6 + [8]
    x = torch.randn(layout.length, 2, 3)[:, 1]
    for step in strips:
        view = step.rows.of(x)
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(view, torch.stack([x[a:b] for a, b in step.rows.ranges]))


def test_groups_are_all_slices_and_share_no_row_and_no_key(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        plan = random_plan(rng)
        rank, source = rng.randrange(plan.degree), rng.randrange(plan.degree)
        slices = plan.slices(rank, source)
        found = groups(slices)
        wanted = sorted(s._replace(mask="causal") if s.area == 1 else s for s in slices)
        assert sorted(s for group in found for s in group) == wanted
        for group in found:
            assert len({s.mask for s in group}) == 1
            for bounds in ([(s.q_start, s.q_end) for s in group], [(s.k_start, s.k_end) for s in group]):
                assert all(a[1] <= b[0] for a, b in pairwise(bounds)), group
        steps = [s for step in steps_of(slices, NAIVE_VARLEN) for s in slices_of(step)]
        assert sorted(steps) == wanted


def test_packed_documents_are_one_call_without_copies() -> None:
    starts = (0, 3, 4, 11, 30)
    layout = LAYOUTS["zigzag"](40, 1)
    slices = AttentionPlan(layout, layout, (starts, starts)).slices(0, 0)
    (step,) = steps_of(slices, NAIVE_VARLEN)
    assert step.rows.span == step.columns.span == slice(0, 80)
    assert step.segments is not None and step.segments.causal
    assert step.segments.q_bounds == step.segments.k_bounds == (0, 3, 4, 11, 30, 40, 43, 44, 51, 70, 80)
    x = torch.arange(80.0)
    assert step.rows.of(x).data_ptr() == x.data_ptr()


def test_a_zigzag_hop_is_one_call_with_documents_too() -> None:
    layout = LAYOUTS["zigzag"](800, 4)
    plan = AttentionPlan(layout, layout, (tuple(range(0, 800, 400)),))
    assert max(len(steps_of(plan.slices(r, s), NAIVE_VARLEN)) for r in range(4) for s in range(4) if r != s) == 1


def test_rows_are_read_and_written_in_order(seed: int) -> None:
    rows, x = Rows(((1, 3), (5, 8)), reverse=True), torch.arange(10.0)
    assert rows.span is None and rows.of(x).tolist() == [2, 1, 7, 6, 5]
    rows.assign_(x, torch.tensor([20.0, 10, 70, 60, 50]))
    assert x.tolist() == [0, 10, 20, 3, 4, 50, 60, 70, 8, 9]
    rows.add_(x, torch.ones(5))
    assert x.tolist() == [0, 11, 21, 3, 4, 51, 61, 71, 8, 9]
    blocks = Blocks(1, 2, 3, 3)
    assert blocks.of(x).tolist() == [[11, 21], [4, 51], [71, 8]] and blocks.ranges == ((1, 3), (4, 6), (7, 9))
    blocks.assign_(x, torch.zeros(3, 2))
    blocks.add_(x, torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    assert x.tolist() == [0, 1, 2, 3, 3, 4, 61, 5, 6, 9]
    assert Rows(((1, 3), (3, 8))).span == slice(1, 8) and Rows(((1, 3), (4, 8))).span is None


def test_sums_need_no_zeros(seed: int) -> None:
    """Whatever was in their memory."""
    rng = random.Random(seed)
    for _ in range(50):
        total, wanted = torch.full((20, 2), float("nan")), torch.zeros(20, 2)
        sums = Sums(total, *total.unbind(1))
        for _ in range(rng.randrange(5)):
            start = rng.randrange(8)
            rows = rng.choice(
                [
                    Blocks(start, 3, 1, 0),
                    Blocks(start, 2, 3, 4),
                    Rows(((start, start + 1), (9, 12)), rng.random() < 0.5),
                ]
            )
            index = torch.arange(20)[rows.host].view(rows.of(total).shape[:-1])
            addends = [torch.randn(index.shape) for _ in range(2)]
            sums.add(rows, *addends)
            wanted[index] += torch.stack(addends, -1)
        assert torch.equal(sums.finished(), wanted)


def test_calls_are_found_once_for_all_layers() -> None:
    layout = LAYOUTS["zigzag"](64, 2)
    slices = AttentionPlan(layout, layout, ((0, 10),)).slices(1, 0)
    assert steps_of(slices, NAIVE_VARLEN) is steps_of(slices, NAIVE_VARLEN)
    assert steps_of(slices, NAIVE) is not steps_of(slices, NAIVE_VARLEN)


def everything(plan: AttentionPlan, kernel: Kernel, softcap: float | None, seed: int) -> list[Tensor]:
    """Output, log-sum-exp and gradients of all ranks, batch rows flattened."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(plan.documents) * size for size in plan.keys.sizes]

    def shards(heads: int, spread: float) -> list[Tensor]:
        return [spread * torch.randn(n, heads, 8, generator=generator, dtype=torch.float64) for n in sizes]

    q, k, v, dout = shards(4, 2.0), shards(2, 1.0), shards(2, 1.0), shards(4, 1.0)
    ring = VirtualRing(plan, kernel, Scoring(0.4, softcap))
    out, lse = ring.forward(q, k, v)
    return [torch.cat(t) for t in (out, lse, *ring.backward(dout, q, k, v, out, lse))]


def test_grouped_calls_equal_slice_after_slice(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        plan, softcap, number = random_plan(rng), rng.choice([None, 5.0]), rng.randrange(2**31)
        wanted = everything(plan, WHOLE, softcap, number)
        for found, reference in zip(everything(plan, NAIVE_VARLEN, softcap, number), wanted, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


def test_cut_triangles_equal_whole_ones(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        strip = rng.choice([(1, 2), (2, 4), (3, 9)])
        small = replace(CPU_FLASH, strip=strip, tile=(11, 11), backward_tile=rng.choice([None, (13, 10)]))
        plan, number = random_plan(rng), rng.randrange(2**31)
        wanted = everything(plan, WHOLE, None, number)
        for found, reference in zip(everything(plan, small, None, number), wanted, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [{"strip": (32, 100)}, {"strip": (32, 512)}, {"tile": (128, 448)}, {"varlen": NAIVE_VARLEN.varlen}],
    ids=str,
)
def test_strips_that_a_kernel_cannot_have(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="strips"):
        replace(CPU_FLASH, **changes)


def test_other_documents_in_the_same_call_do_not_matter(seed: int) -> None:
    rng, layout = random.Random(seed), LAYOUTS["zigzag"](40, 2)
    plan = AttentionPlan(layout, layout, ((0, 13, 17),))
    inputs = [torch.randn(40, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    changed = [t.clone() for t in inputs]
    for t in changed:
        t[13:17] = rng.choice([3.0, float("nan"), float("inf")])
    outside = [t != 1 for t in cut(torch.zeros(40).index_fill(0, torch.arange(13, 17), 1), layout)]
    for kernel in (NAIVE_VARLEN, FLASH_VARLEN):
        found = []
        for tensors in (inputs, changed):
            q, k, v, dout = (cut(t, layout) for t in tensors)
            ring = VirtualRing(plan, kernel, Scoring(0.4))
            out, lse = ring.forward(q, k, v)
            found.append([out, lse, *ring.backward(dout, q, k, v, out, lse)])
        for before, after in zip(*found, strict=True):
            assert all(torch.equal(a[m], b[m]) for a, b, m in zip(before, after, outside, strict=True))


def test_nothing_to_attend_leaves_zero_and_minus_infinity() -> None:
    q = torch.randn(3, 2, 4)
    partial = Partial.empty(q)
    partial.attend(q, q, q, [], NAIVE_VARLEN, Scoring(1.0))
    out, lse = partial.finished(None, q.dtype)
    assert not out.any() and bool(lse.isneginf().all())
    dq = Sums.like(q, q.dtype)
    dkv = gradients(q, q, q, q, q, lse, [], NAIVE, Scoring(1.0), dq)
    assert not dkv.finished().any() and not dq.finished().any()


def extra_bytes(kernel: Kernel, length: int, backward: bool) -> int:
    """Peak bytes beside the operands (q, k, v; backward: dout, dlse) and results (out, lse; backward: dq, dk, dv)."""
    context, watch = SequenceContext.single(1, length), LiveBytes()
    context.plan()
    with watch:
        q, k, v = (torch.randn(1, length, heads, 8, requires_grad=True) for heads in (2, 1, 1))
        out = attention(q, k, v, context, kernel=kernel)
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.randn(1, length, 2, 8))
    queries, keys, lse = 2 * 8, 2 * 8, 2
    numbers = 4 * queries + 2 * keys + 2 * lse if backward else 2 * queries + keys + lse
    return watch.peak - 4 * length * numbers


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "kernel, lengths",
    [(SMALL_FLASH, (4096, 8192)), (replace(NAIVE, tile=(128, 128)), (1024, 2048))],
    ids=["cpu_flash", "naive"],
)
def test_one_rank_holds_a_block_beside_its_operands_and_results(
    kernel: Kernel, lengths: tuple[int, int], backward: bool
) -> None:
    # Rabe and Staats (arXiv 2112.05682): the extra memory does not grow with the sequence.
    # Masks are made once: not in the call that is measured.
    _, short, long = (extra_bytes(kernel, length, backward) for length in (lengths[1], *lengths))
    assert 0 < long == short
