"""SequenceContext: positions, shards, decoding, refusals, immutability."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from attention_cases import random_documents

from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group, alone
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Layout, zigzag


def contexts(layout: Layout, documents: Any) -> list[SequenceContext]:
    """The context of every rank; nothing here communicates."""
    ranks = tuple(range(layout.degree))
    return [SequenceContext(Group(rank, ranks), layout, documents) for rank in ranks]


def test_positions_restart_at_every_document(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        length, degree, name = rng.randrange(1, 40), rng.randrange(1, 6), rng.choice(sorted(LAYOUTS))
        documents = random_documents(rng, rng.randrange(1, 4), length)
        layout = LAYOUTS[name](length, degree, documents)
        for rank, context in enumerate(contexts(layout, documents)):
            positions_BT = context.positions()
            assert positions_BT.shape == (len(documents), context.local_length) and positions_BT.dtype == torch.int64
            for row, starts in enumerate(documents):
                wanted = [token - max(s for s in starts if s <= token) for token in layout.indices(rank).tolist()]
                assert positions_BT[row].tolist() == wanted


def test_shards_are_this_ranks_tokens_in_layout_order() -> None:
    x_BS = torch.arange(2 * 16 * 3).view(2, 16, 3)
    first, second = contexts(zigzag(16, 2), ((0,), (0, 9)))
    assert first.shard(x_BS).tolist() == torch.cat((x_BS[:, :4], x_BS[:, 12:]), 1).tolist()
    assert second.shard(x_BS).tolist() == x_BS[:, 4:12].tolist()
    assert (first.batch, first.length, first.local_length, first.degree, second.rank) == (2, 16, 8, 2, 1)


def test_ranks_agree_on_the_plan() -> None:
    plans = [context.plan(True, 5) for context in contexts(zigzag(37, 3), ((0, 8), (0,)))]
    assert len({(plan.needed_pairs.tobytes(), plan.slices(1, 2)) for plan in plans}) == 1


def test_one_rank_holds_everything() -> None:
    context = SequenceContext.single(3, 7)
    assert context.documents == ((0,), (0,), (0,)) and (context.degree, context.local_length, context.past) == (1, 7, 0)
    x_BS = torch.randn(3, 7)
    assert torch.equal(context.shard(x_BS), x_BS) and torch.equal(context.unshard(x_BS), x_BS)
    assert SequenceContext.single(1, 0).positions().shape == (1, 0)


def test_decoding_continues_positions() -> None:
    context = SequenceContext.single(2, 5)
    for new in (1, 3, 2):
        past, context = context.length, context.extend(new)
        assert (context.past, context.length, context.local_length) == (past, past + new, new)
        assert context.positions().tolist() == [list(range(past, past + new))] * 2
        plan = context.plan()
        assert sum(s.area for s in plan.slices(0, 0)) == 2 * sum(q + 1 for q in range(past, past + new))
    assert SequenceContext.single(1, 0).extend(4).positions().tolist() == [[0, 1, 2, 3]]


def test_decoding_refuses_what_it_cannot_continue() -> None:
    with pytest.raises(UnsupportedError, match="degree 1"):
        contexts(zigzag(8, 2), ((0,),))[0].extend(1)
    with pytest.raises(UnsupportedError, match="packing"):
        SequenceContext.single(1, 8, ((0, 3),)).extend(1)


@pytest.mark.parametrize(
    "documents",
    [((1,),), ((0, 0),), ((0, 5, 3),), ((0, 8),), ((0, 9),), ((),), ((0,), (0, -1)), ((0,), (2, 4))],
)
def test_bad_documents_are_refused(documents: Any) -> None:
    with pytest.raises(ValueError, match="documents of row"):
        SequenceContext.single(len(documents), 8, documents)


def test_documents_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batch of 2 rows"):
        SequenceContext.single(2, 8, ((0,),))


def test_fewer_than_no_new_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        SequenceContext.single(1, 8).extend(-1)


def test_a_layout_of_another_degree_is_refused() -> None:
    with pytest.raises(ValueError, match="2 ranks on a group of 1"):
        SequenceContext(alone().sequence, zigzag(8, 2), ((0,),))


def test_a_context_cannot_be_edited() -> None:
    context = SequenceContext.single(1, 8)
    for name in ("layout", "documents", "past", "group", "ledger"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(context, name, None)
    before = context.positions().tolist(), context.plan()
    context.extend(2)
    assert (context.positions().tolist(), context.plan()) == before and context.past == 0


def test_plans_and_positions_are_computed_once() -> None:
    context = SequenceContext.single(1, 8)
    assert context.plan(True, 3) is context.plan(True, 3) is not context.plan(True, 4)
    assert context.plan(True, 3).slices(0, 0) is context.plan(True, 3).slices(0, 0)
    assert context.positions() is context.positions()
