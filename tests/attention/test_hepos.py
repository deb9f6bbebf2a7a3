"""Head-wise positional strides against a dense mask, over ranks, and what they keep and send.

Legend: B batch, T target tokens, S source tokens, H query heads, K kv heads, E head dim.
"""

import doctest
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from longctx.attention import hepos
from longctx.attention.hepos import StridedKV, hepos_attention, hepos_tree, phases, planned_hepos
from longctx.attention.traffic import Call
from longctx.attention.tree import planned_tree
from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group, alone, build_mesh
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import Kept
from longctx.sequence.layout import LAYOUTS, contiguous


@dataclass(frozen=True)
class Case:
    """A target of ``target`` tokens over a source of ``source``; ``local``: phases of a shard (a planted fault)."""

    target: int = 13
    source: int = 29
    stride: int = 4
    heads: int = 8
    kv_heads: int = 4
    rows: int = 2
    layout: str = "zigzag"
    seed: int = 0
    local: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.target, self.heads), (self.source, self.kv_heads), (self.source, self.kv_heads)]
        shapes.append((self.target, self.heads))
        return tuple(1.7 * torch.randn(self.rows, *s, 5, generator=generator).double() for s in shapes)  # type: ignore[return-value]

    def contexts(self, group: Group, ledger: Ledger | None = None) -> tuple[SequenceContext, SequenceContext]:
        """Of the target and of the source; the source is cut another way."""
        one = ((0,),) * self.rows
        other = "striped" if self.layout == "contiguous" else self.layout
        return (
            SequenceContext(group, LAYOUTS[self.layout](self.target, group.size), one, ledger=ledger),
            SequenceContext(group, LAYOUTS[other](self.source, group.size), one),
        )


def dense(case: Case) -> tuple[Tensor, ...]:
    """Every score held and masked by the definition, per query head; output and gradients."""
    *leaves, dout = case.tensors()
    q, k, v = (t.requires_grad_() for t in leaves)
    group = case.heads // case.kv_heads
    scores = torch.einsum("bthe,bshe->bhts", q, k.repeat_interleave(group, 2)) * 5**-0.5
    phase_H = torch.arange(case.heads) // group % case.stride
    seen_HS = torch.arange(case.source) % case.stride == phase_H[:, None]
    weights = scores.masked_fill(~seen_HS[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhts,bshe->bthe", weights, v.repeat_interleave(group, 2))
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def group_here() -> Group:
    size = dist.get_world_size() if dist.is_initialized() else 1
    return build_mesh(size, torch.device("cpu"), 60).sequence if size > 1 else alone().sequence


def solve(case: Case) -> tuple[list[Tensor], list[Tensor], list[Transfer], list[Transfer], int]:
    """This rank's output and gradients, decoded output, transfers, planned ones, numbers kept; collective."""
    ledger, group = Ledger(), group_here()
    target, source = case.contexts(group, ledger)
    q, k, v, dout = case.tensors()
    leaves = [context.shard(t).requires_grad_() for context, t in ((target, q), (source, k), (source, v))]
    kept_source = source
    if case.local:  # positions counted inside the shard
        shard = contiguous(source.local_length, 1)
        kept_source = SequenceContext.single(case.rows, source.local_length)
        assert shard == kept_source.layout
    kv = StridedKV.of(leaves[1], leaves[2], kept_source, case.stride)
    if case.local:
        kv = replace(kv, layout=source.layout)
        return [hepos_tree(q, kv, group)], [], [], [], 0
    out = hepos_attention(leaves[0], kv, target)
    gradients = torch.autograd.grad(out, leaves, target.shard(dout))
    call = Call(case.heads, case.kv_heads, 5, torch.float64)
    planned, posted = planned_hepos(target, source.layout, case.stride, call), list(ledger.transfers)
    whole = [c.unshard(t) for c, t in ((target, out), (target, gradients[0]), *((source, g) for g in gradients[1:]))]
    trees = Ledger()
    decoded = hepos_tree(q, kv, group, trees)
    assert trees.transfers == (
        planned_tree(group, case.rows * case.target * case.heads, 5, 8) if group.size > 1 else []
    )
    return whole, [decoded], posted, planned, kv.numbers


def solve_all(cases: list[Case]) -> list[Any]:
    return [solve(case) for case in cases]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_it_is_a_dense_mask(world: int, pool: Pool, seed: int) -> None:
    """Output, every gradient and decoding, in any layout; grouped heads, short and prime sources, empty lanes."""
    cases = [Case(seed=seed + n, layout=layout) for n, layout in enumerate(sorted(LAYOUTS))]
    cases += [
        Case(7, 3, 4, rows=1, seed=seed), Case(1, 31, 3, 6, 6, seed=seed), Case(2, 24, 2, 4, 2, seed=seed),
        Case(9, 17, 1, 6, 3, seed=seed),
    ]  # fmt: skip
    ranks = [solve_all(cases)] if world == 1 else pool.run(solve_all, world, cases)
    for number, case in enumerate(cases):
        wanted = dense(case)
        for rank in ranks:
            whole, (decoded,), posted, planned, _ = rank[number]
            for found, reference in zip(whole, wanted, strict=True):
                close(found, reference)
            close(decoded, wanted[0])
            assert torch.equal(decoded, ranks[0][number][1][0])
            assert posted == planned and bool(posted) == (world > 1)


def test_phases_inside_a_shard_are_noticed(pool: Pool, seed: int) -> None:
    """The planted fault: where shards do not start at multiples of the stride, their own positions are wrong ones."""
    case = Case(seed=seed, local=True, layout="zigzag")
    for (found,), *_ in pool.run(solve, 3, case):
        assert (found - dense(case)[0]).abs().max() > 1e-2


def test_each_head_keeps_its_share_and_all_see_everything(pool: Pool, seed: int) -> None:
    case = Case(source=31, stride=4, seed=seed)
    source = SequenceContext.single(2, 31)
    _, k, v, _ = case.tensors()
    kv = StridedKV.of(k, v, source, 4)
    assert [keys.shape[1] for keys in kv.keys] == [8, 8, 8, 7]
    assert sorted(int(i) for lane in phases(source, 4) for i in lane) == list(range(31))
    for lane, rows in enumerate(phases(source, 4)):
        assert torch.equal(kv.keys[lane], k[:, rows, lane::4]) and torch.equal(kv.values[lane], v[:, rows, lane::4])
    even = Case(source=32, seed=seed)
    full = 2 * 2 * 32 * 4 * 5
    assert solve(even)[4] * 4 == full
    assert sum(rank[4] for rank in pool.run(solve, 3, even)) * 4 == full


def test_it_sends_a_share_of_full_cross_attention(seed: int) -> None:
    bytes_of = {}
    for stride in (1, 4):
        case = Case(target=64, source=96, stride=stride, seed=seed, layout="contiguous")
        target, source = case.contexts(Group(0, (0, 1, 2)))
        planned = planned_hepos(target, source.layout, stride, Call(8, 4, 5, torch.float64))
        bytes_of[stride] = sum(t.bytes for t in planned if t.direction == "send")
    assert bytes_of[1] == 4 * bytes_of[4] > 0


def test_recomputation_changes_no_bit(seed: int) -> None:
    case = Case(seed=seed)
    target, source = case.contexts(alone().sequence)
    q, k, v, dout = case.tensors()
    found = []
    for again in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        region = target.keeping(Kept()) if again else target

        def layer(q: Tensor, k: Tensor, v: Tensor, region: SequenceContext = region) -> Tensor:
            return hepos_attention(q, StridedKV.of(k, v, source, case.stride), region)

        out = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=True) if again else layer(*leaves)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout)] if not again else [out.detach()])
        if again:
            out.backward(dout)
            found[1] += [t.grad for t in leaves if t.grad is not None]
    assert len(found[1]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_cannot_work_is_refused() -> None:
    case = Case()
    target, source = case.contexts(alone().sequence)
    q, k, v, _ = case.tensors()
    for stride in (0, 3, 8):
        with pytest.raises(UnsupportedError, match="use a stride that divides the kv heads"):
            StridedKV.of(k, v, source, stride)
    with pytest.raises(UnsupportedError, match="the source is packed"):
        StridedKV.of(k, v, SequenceContext.single(2, 29, ((0, 3), (0,))), 4)
    with pytest.raises(ValueError, match="do not fit a source of 2 x 29"):
        StridedKV.of(k[:, 1:], v[:, 1:], source, 4)
    kv = StridedKV.of(k, v, source, 4)
    with pytest.raises(UnsupportedError, match="the target is packed"):
        hepos_attention(q, kv, SequenceContext.single(2, 13, ((0, 3), (0,))))
    with pytest.raises(UnsupportedError, match="use a multiple of the kv heads"):
        hepos_attention(q[:, :, :6], kv, target)
    with pytest.raises(ValueError, match="do not fit a target"):
        hepos_attention(q[:, 1:], kv, target)
    pair = SequenceContext(Group(0, (0, 1)), contiguous(13, 2), ((0,),) * 2, scheme="ulysses")
    with pytest.raises(UnsupportedError, match=r"scheme ulysses.*target\.under\('ring'\)"):
        hepos_attention(q[:, :7], replace(kv, layout=contiguous(29, 2)), pair)


def test_its_example_is_true() -> None:
    failed, tried = doctest.testmod(hepos)
    assert not failed and tried >= 4
