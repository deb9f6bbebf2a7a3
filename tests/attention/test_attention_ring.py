"""Attention over any number of ranks against a dense fp64 oracle: output and all gradients, to 1e-10."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from attention_cases import Answer, Problem, context_of, oracle, random_problem, run_here, solve, worst
from pool import Pool

from longctx.attention.kernels import CPU_FLASH, Scoring
from longctx.attention.ring import RingAttention, RingCall
from longctx.attention.travel import Schedules
from longctx.runtime.mesh import Group, build_mesh
from longctx.sequence.collectives.ring import _Flight
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Layout, Run, contiguous
from longctx.sequence.plan import AttentionPlan

# Corners that random shapes may miss.
CORNERS = (
    Problem(1),
    Problem(2, ((0,), (0, 1)), heads=4, kv_heads=2),
    # Every token its own document: no rank sees anything elsewhere.
    Problem(13, (tuple(range(13)),), heads=3, kv_heads=3),
    # Documents that end where the chunks of two contiguous ranks do: nothing is sent at degree 2.
    Problem(16, ((0, 8),), layout="contiguous"),
    Problem(31, ((0,),) * 3, window=1),
    Problem(29, ((0, 3, 17),), heads=6, kv_heads=2, causal=False, window=5),
    Problem(23, ((0,),), causal=False, layout="contiguous", scale=2.0),
    Problem(3, ((0,), (0, 2)), causal=False),
)


def assert_exact(pool: Pool, world: int, problems: Sequence[Problem], wanted: Sequence[Answer]) -> None:
    for problem, found, reference in zip(problems, solve(pool, world, problems), wanted, strict=True):
        errors = worst(found, reference)
        assert max(errors.values()) < 1e-10, (world, problem, errors)


def test_every_degree_equals_the_dense_oracle(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    problems = [*CORNERS, *(random_problem(rng, rng.choice(["naive", "cpu_flash", "strips"])) for _ in range(30))]
    wanted = [oracle(problem) for problem in problems]
    for world in (1, 2, 3, 4):
        assert_exact(pool, world, problems, wanted)


@pytest.mark.tier2
@pytest.mark.parametrize("world", [5, 8])
def test_many_ranks_equal_the_dense_oracle(pool: Pool, seed: int, world: int) -> None:
    rng = random.Random(seed)
    problems = [*CORNERS, *(random_problem(rng) for _ in range(60))]
    # Longer than the kernel's own blocks, so that its inner tiling is met too.
    problems += [replace(random_problem(rng), length=prime, documents=((0, 100),)) for prime in (521, 389)]
    assert_exact(pool, world, problems, [oracle(problem) for problem in problems])


def test_the_comparison_notices_a_single_missing_key(pool: Pool) -> None:
    problem = Problem(31, window=9)
    (found,) = solve(pool, 2, [problem])
    errors = worst(found, oracle(replace(problem, window=10)))
    assert min(errors.values()) > 1e-6, errors


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=str)
def test_narrow_dtypes_stay_close_and_do_not_lose_with_more_ranks(pool: Pool, dtype: Any, bound: float) -> None:
    problem = Problem(97, ((0, 40), (0,)), 4, 2, 16, dtype=dtype)
    for world in (1, 2, 4):
        (found,) = solve(pool, world, [problem])
        assert {t.dtype for name, t in found.tensors().items() if name != "lse"} == {dtype}
        assert max(worst(found, oracle(problem)).values()) < bound, world


def test_one_rank_repeats_to_the_bit_and_so_do_three(pool: Pool, seed: int) -> None:
    problem = replace(random_problem(random.Random(seed)), dtype=torch.float32)
    for world in (1, 3):
        first, again = solve(pool, world, [problem, problem])
        assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True))


def test_a_rank_without_tokens_takes_part(pool: Pool) -> None:
    problems = [Problem(length, layout=name) for length in (1, 2, 3) for name in sorted(LAYOUTS)]
    assert any(0 in context_of(p, Group(0, tuple(range(4)))).layout.sizes for p in problems)
    assert_exact(pool, 4, problems, [oracle(p) for p in problems])


def side_by_side_here(problems: list[Problem]) -> list[torch.Tensor]:
    """Two sequence groups in one world, each with its own problems; collective within a group."""
    mesh = build_mesh(2, torch.device("cpu"), 60)
    context = context_of(problems[mesh.data.rank], mesh.sequence)
    return [context.unshard(t) for t in run_here(problems[mesh.data.rank], context)]


def test_sequences_side_by_side_do_not_mix(pool: Pool) -> None:
    problems = [Problem(11, ((0, 4),), 4, 2, seed=1), Problem(11, ((0, 4),), 4, 2, seed=2)]
    found = pool.run(side_by_side_here, 4, problems)
    for rank, parts in enumerate(found):
        assert max(worst(Answer(*parts), oracle(problems[rank // 2])).values()) < 1e-10


def idle_gradient_here(length: int) -> list[float | None]:
    """Only the last token's output enters the loss; every rank still runs its backward, and keys get gradients."""
    from longctx.attention import attention

    group = build_mesh(dist.get_world_size(), torch.device("cpu"), 60).sequence
    context = SequenceContext(group, LAYOUTS["contiguous"](length, group.size), ((0,),))
    q, k, v = (torch.ones(1, context.local_length, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, context)
    last = group.rank == group.size - 1
    (out[:, -1:].sum() if last else out.sum() * 0).backward()
    return [None if t.grad is None else float(t.grad.sum()) for t in (q, k, v)]


def test_gradients_reach_ranks_whose_own_outputs_are_unused(pool: Pool) -> None:
    # Equal keys share the last query evenly: each value gets 1 / 9 of a gradient of 4 numbers.
    for dq, dk, dv in pool.run(idle_gradient_here, 3, 9):
        assert dq == pytest.approx(0, abs=1e-12) and dk == pytest.approx(0, abs=1e-12)
        assert dv == pytest.approx(3 * 4 / 9, abs=1e-12)


def blind_here(kv_heads: int) -> list[torch.Tensor]:
    """Queries of three documents over keys of the last one alone; the first rank sees nothing at all."""
    group = build_mesh(2, torch.device("cpu"), 60).sequence
    queries, keys = contiguous(12, 2), Layout(12, ((), (Run(9, 12),)))
    plan = AttentionPlan(queries, keys, ((0, 4, 9),))
    generator = torch.Generator().manual_seed(group.rank)
    shapes = ((6, 2), (keys.sizes[group.rank], kv_heads), (keys.sizes[group.rank], kv_heads))
    q, k, v = (torch.randn(n, h, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n, h in shapes)
    schedules = Schedules(plan)
    back = schedules.back if kv_heads == 2 else None
    call = RingCall(plan, group, schedules.there, back, None, CPU_FLASH, Scoring(0.5))
    out, lse = RingAttention.apply(q, k, v, None, None, call)  # type: ignore[no-untyped-call]
    out.backward(torch.ones_like(out))
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), lse, q.grad, k.grad, v.grad]


@pytest.mark.parametrize("kv_heads", [1, 2], ids=["keys travel", "queries travel"])
def test_rows_and_ranks_that_see_nothing_give_zeros(pool: Pool, kv_heads: int) -> None:
    first, last = pool.run(blind_here, 2, kv_heads)
    assert bool((first[0] == 0).all()) and bool(first[1].isneginf().all()) and bool((first[2] == 0).all())
    out, lse, dq, dk, dv = last
    assert bool((out[:3] == 0).all()) and bool(lse[:3].isneginf().all()) and bool((dq[:3] == 0).all())
    for part in (out[3:], lse[3:], dk, dv):
        assert bool(part.isfinite().all()) and bool((part != 0).any())


def order_here(kv_heads: int) -> tuple[list[str], list[str]]:
    """What a rank does forward and backward, in order, where every rank needs all keys: post, call the kernel, wait."""
    size, events = dist.get_world_size(), list[str]()
    group = build_mesh(size, torch.device("cpu"), 60).sequence

    def told(event: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(event(*args))
            return function(*args)

        return call

    def posted(operations: list[Any]) -> str:
        return "home" if operations[0].group is group.returning else "next"

    kernel = replace(
        CPU_FLASH, forward=told(lambda *_: "kernel", CPU_FLASH.forward),
        backward=told(lambda *_: "kernel", CPU_FLASH.backward),
    )  # fmt: skip
    schedules = Schedules(AttentionPlan(contiguous(12, size), contiguous(12, size), ((0,),), causal=False))
    back = schedules.back if kv_heads == 2 else None
    call = RingCall(schedules.plan, group, schedules.there, back, None, kernel, Scoring(0.5))
    q, k, v = (torch.randn(12 // size, heads, 4, dtype=torch.float64) for heads in (2, kv_heads, kv_heads))
    with (
        patch.object(dist, "batch_isend_irecv", told(posted, dist.batch_isend_irecv)),
        patch.object(_Flight, "land", told(lambda *_: "wait", _Flight.land)),
    ):
        out, _ = RingAttention.apply(q.requires_grad_(), k, v, None, None, call)  # type: ignore[no-untyped-call]
        forward = events.copy()
        out.sum().backward()
    return forward, events[len(forward) :]


@pytest.mark.parametrize("kv_heads", [1, 2], ids=["keys travel", "queries travel"])
def test_the_next_block_is_on_its_way_while_the_kernel_works(pool: Pool, kv_heads: int) -> None:
    for forward, backward in pool.run(order_here, 3, kv_heads):
        assert forward == ["next", "kernel", "wait", "next", "kernel", "wait", "kernel"]
        sent = [event for event in backward if event != "wait"]
        assert sent == ["next", "kernel", "next", "kernel", "home", "kernel", "home"]
