"""Which scheme is chosen, where the answer is plain from the numbers, and that the reason says why."""

from dataclasses import replace

import pytest
import torch
from attention_cases import Problem, layout_of
from pool import Pool
from training import Case, build

from longctx.attention.choice import MACHINES, Machine, candidates, choose_scheme, estimate
from longctx.attention.schemes import SCHEMES
from longctx.attention.traffic import Call
from longctx.errors import ConfigError, UnsupportedError
from longctx.runtime.mesh import build_mesh, default_inner, folded
from longctx.sequence.context import SequenceContext

LLAMA = Call(32, 8, 128, torch.bfloat16)


def on(degree: int, inner: int | None = None, length: int = 2**17, layout: str = "zigzag") -> SequenceContext:
    problem = Problem(length, layout=layout)
    return SequenceContext(folded(0, degree, inner or degree), layout_of(problem, degree), problem.documents)


def test_one_rank_has_nothing_to_choose() -> None:
    assert choose_scheme(on(1), LLAMA, "cuda").scheme == "ring"


def test_a_compute_bound_ring_hides_its_messages_and_wins() -> None:
    choice = choose_scheme(on(8, length=2**20), LLAMA, "cuda")
    assert choice.scheme == "ring"
    assert choice.seconds["ring"] < choice.seconds["ulysses"]
    assert "ulysses 1." in choice.reason


def test_a_slow_wire_between_short_shards_prefers_fewer_bytes() -> None:
    # The ring sends 2 K E numbers 7 times forward and three times as much back, the exchange everything twice.
    wire = Machine(flops=1e18, inner=1e9, outer=1e9)
    seconds = {s: estimate(on(8, length=2**14), s, LLAMA, wire) for s in ("ring", "ulysses")}
    assert seconds["ulysses"] < seconds["ring"]


def test_a_layout_without_balance_costs_the_ring_and_not_the_exchange() -> None:
    machine = MACHINES["cuda"]
    ring, exchange = (
        estimate(on(8, length=2**20, layout="contiguous"), scheme, LLAMA, machine)
        / estimate(on(8, length=2**20), scheme, LLAMA, machine)
        for scheme in ("ring", "ulysses")
    )
    assert ring == pytest.approx(15 / 8, rel=0.01)
    assert exchange == pytest.approx(1, rel=0.01)


def test_more_ranks_than_heads_leave_ulysses_idle() -> None:
    few = replace(LLAMA, heads=4, kv_heads=1)
    machine = Machine(flops=1e12, inner=1e15, outer=1e15)
    seconds = {s: estimate(on(16, length=2**14), s, few, machine) for s in ("ring", "ulysses")}
    assert seconds["ulysses"] == pytest.approx(4 * seconds["ring"], rel=0.01)


def test_between_slow_nodes_a_double_ring_beats_a_ring() -> None:
    seconds = {s: estimate(on(16, 8, 2**14), s, LLAMA, Machine(1e18, 1e12, 1e9)) for s in ("ring", "double_ring")}
    # All 15 hops of a ring leave a node somewhere; of a double ring's 15 only the one that starts the second turn.
    assert seconds["double_ring"] < 0.2 * seconds["ring"]


def test_two_dimensional_schemes_are_candidates_only_where_they_differ() -> None:
    assert candidates(on(8, 8), LLAMA) == candidates(on(8, 1), LLAMA) == ["ring", "ulysses", "allgather"]
    assert candidates(on(64, 8), LLAMA) == ["ring", "ulysses", "hybrid", "double_ring"]


def test_inner_groups_never_leave_a_node() -> None:
    assert [default_inner(8, 4), default_inner(4, 8), default_inner(6, 4), default_inner(3, 4)] == [4, 4, 2, 1]


def test_a_scheme_that_needs_groups_says_so_and_an_unknown_one_is_named() -> None:
    from longctx.attention import attention

    x = torch.zeros(1, 4, 1, 4)
    group = build_flat(2)
    cases = (("hybrid", "sequence.inner"), ("double_ring", "sequence.inner"), ("spiral", "choices: ring, "))
    for scheme, said in cases:
        context = SequenceContext(group, layout_of(Problem(8), 2), ((0,),), scheme=scheme)
        with pytest.raises(UnsupportedError, match=said):
            attention(x, x, x, context)


def build_flat(size: int):  # type: ignore[no-untyped-def]
    return replace(folded(0, size, 1), inner=None, outer=None)


def refused_here() -> str:
    try:
        build_mesh(4, torch.device("cpu"), 60, 3)
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_inner_groups_that_do_not_divide_the_degree_are_refused(pool: Pool) -> None:
    assert set(pool.run(refused_here, 4)) == {
        "sequence.inner = 3 does not divide sequence.degree = 4; choose one of 1, 2, 4"
    }


def chosen_here(case: Case) -> tuple[str, list[str]]:
    trainer, watch = build(case)
    trainer.run()
    return trainer.attention.scheme, [e["reason"] for e in watch.events if e["event"] == "attention"]


def test_a_run_says_once_what_was_chosen(pool: Pool) -> None:
    for scheme, reasons in pool.run(chosen_here, 2, Case(degree=2, inner=2, scheme="auto")):
        assert scheme in SCHEMES
        assert len(reasons) == 1 and "least estimated time" in reasons[0]
    assert pool.run(chosen_here, 2, Case(degree=2, scheme="ulysses")) == [("ulysses", [])] * 2
