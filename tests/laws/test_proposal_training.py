"""Proposal heads in training: which labels they see, what moves and what does not, and law 1 for them."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pool import Pool
from small_mixers import small_options
from test_invisible_sharding_deepspeed import deepspeed
from training import Case, RandomRows, Result, assert_same_training, build, model_config, train

from longctx.config.schema import Proposals
from longctx.mixers.statistics import statistics_of
from longctx.model.block_transformer import build_native
from longctx.model.proposals import Targets, with_proposals
from longctx.runtime.mesh import Group
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.train.ahead import Ahead, labels_ahead
from longctx.train.batches import RowSource

HEADS = {"heads": 3, "width": 20}
VQ = small_options("transformer_vq")
KINDS: dict[str, dict[str, Any]] = {
    "joint": {"proposals": HEADS},
    "all": {"proposals": {**HEADS, "learn": "all"}},
    "frozen": {"proposals": {**HEADS, "base": "frozen"}},
}


def by_hand(rows: RandomRows, row: int, distance: int) -> list[int]:
    """Token by token: the label of the token ``distance`` further right, if that is of the same document and row."""
    _, labels = rows.whole(row)
    starts, found = rows.documents(row), []
    for t in range(rows.length):
        crossed = any(t < start <= t + distance for start in starts)
        found.append(-100 if t + distance >= rows.length or crossed else int(labels[t + distance]))
    return found


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_labels_ahead_are_those_of_tokens_further_right(name: str, seed: int) -> None:
    rows, kept = RandomRows(29, 61, seed, documents_per_row=4), 0
    for row, degree, distance in product(range(12), (1, 2, 3, 7), (1, 2, 5, 40)):
        layout, wanted = LAYOUTS[name](29, degree, (rows.documents(row),)), np.array(by_hand(rows, row, distance))
        for rank in range(degree):
            found = labels_ahead(rows, row, distance, layout, rank)
            assert np.array_equal(found, wanted[layout.indices(rank)])
            kept += int((found != -100).sum())
    assert kept > 0


def test_every_head_gets_its_share_of_rows_whatever_the_micro_batches() -> None:
    ahead = Ahead(Proposals(heads=3), seed=4)
    drawn = [ahead.distances(row) for row in range(3000)]
    counts = [drawn.count((distance,)) for distance in (1, 2, 3)]
    assert sum(counts) == 3000 and min(counts) > 900
    assert [Ahead(Proposals(heads=3), seed=5).distances(row) for row in range(30)] != drawn[:30]
    rows = RandomRows(11, 61, 1)
    context = SequenceContext(Group(0, (0,)), LAYOUTS["zigzag"](11, 1), ((0,),) * 4)
    targets = ahead.targets(rows, range(20, 24), context)
    for distance, learning in enumerate(targets.rows, start=1):
        assert learning == tuple(i for i in range(4) if drawn[20 + i] == (distance,))
    assert targets.labels_NT.shape == (4, 11)
    every = Ahead(Proposals(heads=3, learn="all"), seed=4).targets(rows, range(20, 24), context)
    assert every.rows == ((0, 1, 2, 3),) * 3 and every.labels_NT.shape == (12, 11)
    assert every.labels_NT[4].tolist() == by_hand(rows, 20, 2)


def test_the_loss_is_that_of_each_head_on_its_rows(seed: int) -> None:
    """Against plain cross entropy; the head without a row is in the graph and gets a gradient of 0."""
    case = Case(model=KINDS["joint"], seed=seed)
    model = with_proposals(build_native(model_config(case), seed=seed), seed).double()
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(61, (3, 9), generator=generator) for _ in range(2))
    labels[1, 2:5] = -100
    rows = ((2,), (), (0, 1))
    output = model(tokens, SequenceContext.single(3, 9), tokens, targets=Targets(labels, rows), loss_chunk=4)
    wanted, number = torch.zeros((), dtype=torch.float64), 0
    for head, own in zip(model.proposals, rows, strict=True):
        for row in own:
            h_1TD = output.hidden_BTD[row : row + 1]
            logits_TV = model.logits(h_1TD + head.down_proj(head.up_proj(h_1TD).clamp_min(0)))[0]
            wanted = wanted + torch.nn.functional.cross_entropy(logits_TV, labels[number], reduction="sum")
            number += 1
    torch.testing.assert_close(output.proposal_loss_sum, wanted, rtol=1e-12, atol=1e-12)
    output.proposal_loss_sum.backward()
    idle = model.proposals[1]
    assert all(p.grad is not None and not p.grad.any() for p in idle.parameters())
    assert all(bool(p.grad.any()) for p in model.proposals[2].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_law_1(kind: str, pool: Pool, seed: int) -> None:
    """Sequence degrees, data degrees and micro-batches of another size: the same losses, gradients and weights."""
    case = Case(length=37, batch=6, steps=6, seed=seed % 1000, model=KINDS[kind], lr=1e-3)
    (wanted,) = pool.run(train, 1, case)
    assert len(wanted.proposal_losses) == 6
    for world, degree, micro in ((2, 2, 2), (3, 3, 1), (2, 1, 3)):
        found = pool.run(train, world, replace(case, degree=degree, micro_batch=micro))[0]
        assert_same_training(found, wanted, 1e-10)


class OwnShardOnly(Ahead):
    """The planted fault: a rank knows no label to the right of its own tokens."""

    def targets(self, source: RowSource, rows: range, context: SequenceContext) -> Targets:
        found = super().targets(source, rows, context)
        found.labels_NT[:, -1] = -100
        return found


def first_proposal_loss(case: Case, faulty: bool) -> float:
    trainer, watch = build(case)
    if faulty:
        assert trainer.ahead is not None
        trainer.ahead = OwnShardOnly(trainer.ahead.proposals, trainer.ahead.seed)
    trainer.run()
    return float(watch.records[0]["proposal_loss"])


def test_law_1_notices_a_rank_that_reads_only_its_own_labels(pool: Pool) -> None:
    case = Case(steps=1, batch=6, model=KINDS["all"], layout="contiguous")
    (wanted,) = pool.run(first_proposal_loss, 1, case, False)
    found = [pool.run(first_proposal_loss, 3, replace(case, degree=3), faulty)[0] for faulty in (False, True)]
    assert found[0] == pytest.approx(wanted, rel=1e-12)
    assert abs(found[1] - wanted) > 1e-4


@pytest.mark.parametrize("kind, mixed", [
    ("frozen", {}), ("joint", {}),
    pytest.param("joint", {"recurrence": {"kind": "rmt", "segment": 11, "memory": 3}}, marks=pytest.mark.tier2),
    pytest.param("frozen", {"block": {"size": 4, "layers": 1}}, marks=pytest.mark.tier2),
    pytest.param("frozen", {"mixer": "gated_retention"}, marks=pytest.mark.tier2),
])  # fmt: skip
def test_zero_3_agrees(kind: str, mixed: dict[str, Any], pool: Pool) -> None:
    """Parameters stay partitioned; heads without a row and a frozen decoder neither hang nor keep old gradients."""
    model = {**KINDS[kind], **mixed, "init_std": 0.05}
    case = Case(length=37, batch=4, steps=12, seed=5, model=model, lr=1e-3, fp64=False)
    (wanted,) = pool.run(train, 1, case)
    found = pool.run(train, 2, replace(case, degree=2, engine=deepspeed(3)), limit_s=120)[0]
    assert_same_training(found, wanted, 1e-5)


def outcome(case: Case) -> tuple[Result, dict[str, torch.Tensor]]:
    start = dict(build(case)[0].engine.module.state_dict())
    before = {name: tensor.clone() for name, tensor in start.items()}
    return train(case), before


@pytest.mark.parametrize("kind", ["joint", "frozen"])
def test_what_is_frozen_does_not_move(kind: str, pool: Pool) -> None:
    """Neither by a gradient nor by weight decay; its loss is that of the same decoder without heads."""
    case = Case(length=37, batch=4, steps=8, seed=3, lr=1e-2, model=KINDS[kind])
    ((result, before),) = pool.run(outcome, 1, case)
    moved = {name for name, tensor in result.weights.items() if not torch.equal(tensor, before[name])}
    decoder = {name for name in before if name.startswith("decoder.")}
    heads = set(before) - decoder
    assert len(heads) == 12 and heads <= moved
    assert (moved & decoder) == (set() if kind == "frozen" else decoder)
    assert set(result.gradients) == (heads if kind == "frozen" else set(before))
    (plain,) = pool.run(train, 1, replace(case, model={}))
    assert result.losses[0] == pytest.approx(plain.losses[0], rel=1e-12)
    assert all(norm > 0 for norm in result.grad_norms)


def test_statistics_of_a_frozen_decoder_do_not_move(pool: Pool) -> None:
    model = {**KINDS["frozen"], "mixer": "transformer_vq", "mixer_options": {"transformer_vq": VQ}}
    case = Case(length=37, batch=2, steps=2, seed=3, model=model)
    assert pool.run(statistics_moved, 1, case) == [(False,)]
    assert pool.run(statistics_moved, 1, replace(case, model={**model, "proposals": HEADS})) == [(True,)]


def statistics_moved(case: Case) -> tuple[bool]:
    trainer, _ = build(case)
    before = {name: buffer.clone() for name, buffer in statistics_of(trainer.engine.module).items()}
    assert before
    trainer.run()
    after = statistics_of(trainer.engine.module)
    return (any(not torch.equal(after[name], before[name]) for name in before),)
