"""Law 6: what the ranks send is what was planned, every send has its receive, and totals equal the formulas."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attention_cases import Problem, context_of, layout_of, random_problem, run_here, solve, visible
from law_models import Decoder, random_tokens, sequence_group
from pool import Pool

from longctx.attention.schemes import SCHEMES
from longctx.attention.traffic import Call, planned_passes, planned_traffic
from longctx.runtime.mesh import folded
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import AttentionPlan

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def call_of(problem: Problem) -> Call:
    return Call(problem.heads, problem.kv_heads, problem.head_dim, problem.dtype, problem.causal, problem.window)


def planned(problem: Problem, world: int) -> list[list[Transfer]]:
    inner = math.gcd(problem.inner, world)
    contexts = [context_of(problem, folded(rank, world, inner)) for rank in range(world)]
    return [planned_traffic(context, call_of(problem)) for context in contexts]


def assert_sends_are_received(ranks: Sequence[Sequence[Transfer]]) -> None:
    """Between any two ranks, message by message in order, bytes sent are bytes received."""
    for direction, other in (("send", "receive"), ("receive", "send")):
        for rank, transfers in enumerate(ranks):
            for peer in range(len(ranks)):
                for kind in {t.kind for t in transfers}:
                    ours = [t.bytes for t in transfers if t[:3] == (kind, direction, peer)]
                    theirs = [t.bytes for t in ranks[peer] if t[:3] == (kind, other, rank)]
                    assert ours == theirs, (kind, rank, peer)


def sent(transfers: Sequence[Transfer]) -> int:
    return sum(t.bytes for t in transfers if t.direction == "send")


def test_every_rank_sends_exactly_what_was_planned(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    for world in (2, 3, 4):
        problems = [replace(random_problem(rng), dtype=rng.choice(DTYPES)) for _ in range(30)]
        # Every scheme, also where it travels with queries (no grouped heads) and where heads do not divide.
        problems += [replace(p, scheme=s, kv_heads=p.heads) for p, s in zip(problems, SCHEMES, strict=False)]
        for problem, answer in zip(problems, solve(pool, world, problems), strict=True):
            assert [list(transfers) for transfers in answer.transfers] == planned(problem, world), problem
            assert_sends_are_received(answer.transfers)


def rows_that_travel(problem: Problem, world: int, side: str) -> tuple[list[int], np.ndarray]:
    """From a mask of all pairs: rows of each rank that any other needs, and bool [ranks, sources] who needs whose."""
    layout = layout_of(problem, world)
    rows, needs = [0] * world, np.zeros((world, world), dtype=bool)
    for starts in problem.documents:
        seen = visible(starts, problem.length, problem.causal, problem.window)
        seen = seen if side == "keys" else seen.T
        for source in range(world):
            found = np.zeros(layout.sizes[source], dtype=bool)
            for rank in set(range(world)) - {source}:
                mask = seen[np.ix_(layout.indices(rank), layout.indices(source))]
                found |= mask.any(0)
                needs[rank, source] |= mask.any()
            rows[source] += int(found.sum())
    return rows, needs


def hops(needs: np.ndarray) -> tuple[list[int], list[int]]:
    """How often each block of a plain ring is sent, and the sum of its gradients: past steps without any work."""
    world = len(needs)
    steps = [t for t in range(1, world) if any(needs[r, r - t] for r in range(world))]
    there, home = [], []
    for source in range(world):
        worked = [i for i, t in enumerate(steps) if needs[(source + t) % world, source]]
        there.append(worked[-1] + 1 if worked else 0)
        home.append(worked[-1] - worked[0] + 1 if worked else 0)
    return there, home


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_zigzag_costs_the_formula(pool: Pool, dtype: torch.dtype) -> None:
    batch, kv_heads, head_dim = 2, 3, 8
    for world in (2, 3, 4):
        problem = Problem(2 * world * 3, ((0,),) * batch, 6, kv_heads, head_dim, dtype=dtype)
        rows, _ = rows_that_travel(problem, world, "keys")
        # The chunk that ends the sequence stays where it is: half of the first rank's keys.
        assert rows == [batch * 3, *[batch * 6] * (world - 1)]
        row = 2 * kv_heads * head_dim
        (answer,) = solve(pool, world, [problem])
        for rank, transfers in enumerate(answer.transfers):
            # Forward: a rank passes on every block but that of its next rank, which comes last. Backward: again, and
            # the gradient, in at least fp32, of every block but its own.
            forward = (sum(rows) - rows[(rank + 1) % world]) * row * dtype.itemsize
            gradients = (sum(rows) - rows[rank]) * row * max(dtype.itemsize, 4)
            assert sent(transfers) == 2 * forward + gradients


def test_packed_documents_cost_the_rows_that_others_need(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    for world in (2, 3, 4):
        problems = []
        for layout in sorted(LAYOUTS):
            documents = tuple(tuple(sorted({0, *rng.sample(range(1, 60), 7)})) for _ in range(2))
            causal, window = rng.choice([(True, None), (False, None), (True, 2 * world)])
            problems.append(Problem(60, documents, 6, 2, 8, layout, causal, window, dtype=torch.float32))
        for problem, answer in zip(problems, solve(pool, world, problems), strict=True):
            # Of one row: k and v, as many numbers of gradients; q and dout with two numbers a head, and the gradient.
            forward, keys = costs(problem, world, "keys", 2 * 2 * 8 * 4, 2 * 2 * 8 * 4)
            _, queries = costs(problem, world, "queries", 6 * (2 * 8 + 2) * 4, 6 * 8 * 4)
            assert sum(map(sent, answer.transfers)) == forward + min(keys, queries), problem


def costs(problem: Problem, world: int, side: str, row: int, gradient: int) -> tuple[int, int]:
    """Bytes that all ranks send: of rows that go around, and of these with gradients that come home."""
    rows, needs = rows_that_travel(problem, world, side)
    there, home = hops(needs)
    forward = int(np.dot(rows, there)) * row
    return forward, forward + int(np.dot(rows, home)) * gradient


@pytest.mark.parametrize("end, travellers", [(17, "keys"), (15, "queries")])
def test_a_document_across_two_ranks_sends_its_own_rows_alone(pool: Pool, end: int, travellers: str) -> None:
    """Tokens [9, end) of 24 on two ranks, all others with their documents: five or three queries need three keys."""
    heads, head_dim = 2, 4
    problem = Problem(
        24, ((0, 4, 9, end), (0, 12)), heads, heads, head_dim, "contiguous", dtype=torch.bfloat16
    )  # fmt: skip
    # Of one row: k and v and their fp32 gradients; q and dout with two fp32 numbers a head, and the gradient.
    keys, key_gradients = 2 * heads * head_dim * 2, 2 * heads * head_dim * 4
    queries, query_gradients = heads * (2 * head_dim * 2 + 2 * 4), heads * head_dim * 4
    wanted = {
        "keys": [3 * keys + 3 * keys, 3 * key_gradients],
        "queries": [3 * keys + 3 * query_gradients, 3 * queries],
    }
    (answer,) = solve(pool, 2, [problem])
    assert [sent(transfers) for transfers in answer.transfers] == wanted[travellers]
    # The fewer bytes of the two, of which five queries are more.
    assert 3 * (queries + query_gradients) < 3 * (keys + key_gradients) < 5 * (queries + query_gradients)


def test_a_window_costs_its_neighbours_only(pool: Pool) -> None:
    # Chunks of 8 tokens and a window of 9: each rank needs the one block before its own, and rank 0 none.
    problem = Problem(32, ((0,),), 2, 1, 4, "contiguous", window=9, dtype=torch.float32)
    block = 8 * 2 * 1 * 4 * 4
    (answer,) = solve(pool, 4, [problem])
    assert [sent(transfers) for transfers in answer.transfers] == [2 * block, 3 * block, 3 * block, block]


def test_documents_within_ranks_cost_nothing(pool: Pool) -> None:
    problem = Problem(24, ((0, 8, 16), (0, 3, 8, 16, 20)), layout="contiguous")
    (answer,) = solve(pool, 3, [problem])
    assert answer.transfers == ((), (), ())


class LeakyContext(SequenceContext):
    """A planted fault: a plan that ignores documents."""

    def plan(self, causal: bool = True, window: int | None = None) -> AttentionPlan:
        return AttentionPlan(self.layout, self.layout, ((0,),) * self.batch, causal, window)


def leaky_here(problem: Problem) -> list[Transfer]:
    group = sequence_group()
    ledger = Ledger()
    run_here(problem, LeakyContext(group, context_of(problem, group).layout, problem.documents, ledger=ledger))
    return ledger.transfers


def test_a_plan_that_ignores_documents_is_noticed(pool: Pool) -> None:
    problem = Problem(24, ((0, 9, 17),), layout="contiguous")
    found = pool.run(leaky_here, 3, problem)
    assert_sends_are_received(found)
    assert found != planned(problem, 3)


def test_a_receive_of_other_bytes_is_noticed() -> None:
    ranks = planned(Problem(12), 2)
    index = next(i for i, t in enumerate(ranks[0]) if t.direction == "receive")
    ranks[0][index] = ranks[0][index]._replace(bytes=ranks[0][index].bytes + 1)
    with pytest.raises(AssertionError):
        assert_sends_are_received(ranks)


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor", "all_to_all",
    "all_to_all_single", "broadcast", "reduce", "gather", "scatter", "send", "recv",
)  # fmt: skip


def watched_step_here(decoder: Decoder, recompute: bool) -> tuple[list[Transfer], list[tuple[str, int, int]]]:
    """A forward and backward of the decoder: its ledger, and every message torch.distributed was really given."""
    group = sequence_group()
    ledger = Ledger()
    context = replace(decoder.context(group), ledger=ledger)
    model = decoder.model(recompute=recompute)
    tokens_BS = random_tokens(decoder, 5)
    seen: list[tuple[str, int, int]] = []
    exchange = dist.batch_isend_irecv

    def record(operations: list[dist.P2POp]) -> list[dist.Work]:
        names = {dist.isend: "send", dist.irecv: "receive"}
        seen.extend((names[o.op], o.peer, o.tensor.numel() * o.tensor.element_size()) for o in operations)
        return exchange(operations)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective outside the ring")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", record)
        for name in COLLECTIVES:
            patch.setattr(dist, name, refuse)
        loss_sum = model(context.shard(tokens_BS), context, context.shard(tokens_BS.roll(-1, 1))).loss_sum
        assert loss_sum is not None
        loss_sum.backward()
    return ledger.transfers, seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_scheme_costs_its_formula(pool: Pool, dtype: torch.dtype) -> None:
    batch, heads, kv_heads, head_dim, world = 2, 8, 4, 8, 4
    problem = Problem(world * 6, ((0,),) * batch, heads, kv_heads, head_dim, dtype=dtype, layout="contiguous")
    rows, item, wide = batch * 6, dtype.itemsize, max(dtype.itemsize, 4)
    kv, kv_gradient = rows * 2 * kv_heads * head_dim * item, rows * 2 * kv_heads * head_dim * wide
    output, exchanged = rows * heads * head_dim * item, rows * (heads + 2 * kv_heads) * head_dim * item
    wanted = {
        # All but the own share of queries, keys and values leaves, the output comes back; the same in the backward.
        "ulysses": 2 * (exchanged + output) * (world - 1) // world,
        # The same within pairs; half of the heads of two ranks' tokens go around a ring of two.
        "hybrid": 2 * (exchanged + output) // 2 + 2 * kv + kv_gradient,
        "ring": (world - 1) * (2 * kv + kv_gradient),
        "double_ring": (world - 1) * (2 * kv + kv_gradient),
        "allgather": (world - 1) * (kv + kv_gradient),
    }
    assert set(wanted) == set(SCHEMES)
    for scheme, total in wanted.items():
        (answer,) = solve(pool, world, [replace(problem, scheme=scheme, causal=False)])
        assert [sent(transfers) for transfers in answer.transfers] == [total] * world, scheme


def test_without_grouped_heads_queries_travel_in_half_precision(pool: Pool) -> None:
    problem = Problem(24, heads=4, kv_heads=4, head_dim=8, dtype=torch.bfloat16, causal=False)
    rows, numbers = 6, 4 * 8
    keys = rows * 2 * numbers * 2
    queries = rows * (2 * numbers * 2 + 2 * 4 * 4 + numbers * 4)
    (answer,) = solve(pool, 4, [problem])
    assert [sent(transfers) for transfers in answer.transfers] == [3 * (keys + queries)] * 4
    assert queries < keys + rows * 2 * numbers * 4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_step_of_the_decoder_costs_its_layers_and_nothing_else(pool: Pool, layout: str, recompute: bool) -> None:
    decoder = Decoder(29, ((0,), (0, 11)), layout, torch.float32, window=4)
    for world in (2, 3):
        for rank, (ledger, seen) in enumerate(pool.run(watched_step_here, world, decoder, recompute)):
            # Three kv heads of four numbers, fp32; the backward visits the layers in reverse.
            forward, backward = [], []
            context = context_of(Problem(29, decoder.documents, layout=layout), folded(rank, world, 1))
            for window in (4, None):
                there, back = planned_passes(context, Call(6, 3, 4, torch.float32, window=window))
                forward, backward = forward + there, back + backward
            assert ledger == forward + backward
            assert seen == [(t.direction, t.peer, t.bytes) for t in ledger]
