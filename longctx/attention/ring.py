"""Ring attention: keys and values travel around the ranks, forward and backward.

Ring Attention with Blockwise Transformers (arXiv 2310.01889), with the work cut into slices by an AttentionPlan and
the backward of FlashAttention (global out and log-sum-exp in every block). In the backward either keys and values
travel with their gradients, or queries with theirs (BurstAttention, arXiv 2403.09347), whichever is fewer bytes. Of a
block only the rows that another rank needs travel. With one rank nothing travels and this is memory-efficient attention
in blocks (Rabe and Staats, arXiv 2112.05682).

Legend: N = B*T flattened query rows, M key rows, H query heads, K kv heads, E head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from longctx.attention.bias import bias_gradients
from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.local import Partial, gradients
from longctx.attention.merge import sink_gradient
from longctx.attention.sums import Sums
from longctx.attention.travel import QueryBlock, add_part_, pack_keys, pack_queries, unpack_queries
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger
from longctx.sequence.collectives.ring import Homeward, circulate
from longctx.sequence.collectives.schedule import Schedule
from longctx.sequence.parts import Part
from longctx.sequence.plan import AttentionPlan, Side
from longctx.sequence.slices import Slices


@dataclass(frozen=True)
class RingCall:
    """Everything about one attention call that is no tensor.

    ``there`` moves keys and values; ``back`` moves queries in the backward, None where keys and values travel again.
    """

    plan: AttentionPlan
    group: Group
    there: Schedule
    back: Schedule | None
    ledger: Ledger | None
    kernel: Kernel
    scoring: Scoring

    def part(self, side: Side) -> Part:
        """Which of this rank's flattened rows travel."""
        return self.plan.parts(side)[self.group.rank]

    def sizes(self, side: Side) -> list[int]:
        """Flattened rows of every rank that travel."""
        return self.plan.rows(side)

    def slices(self, step: int, source: int, side: Side) -> Slices:
        """Work at a step on this rank's rows and those of ``source``, which on ``side`` travelled if not its own."""
        rank = self.group.rank
        pair = (rank, source) if side == "keys" else (source, rank)
        return self.plan.visiting(*pair, side) if step else self.plan.slices(*pair)


class RingAttention(torch.autograd.Function):
    """q_NHE, k_MKE, v_MKE, sink_H, bias_2HE -> out_NHE, lse_NH. Saves all of them; lse takes no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, sink_H: torch.Tensor | None,
        bias_2HE: torch.Tensor | None, call: RingCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        partial = Partial.empty(q_NHE)
        for step, source, kv in _blocks(k_MKE, v_MKE, call):
            if kv is None:
                continue
            partial.attend(q_NHE, *kv, call.slices(step, source, "keys"), call.kernel, call.scoring)
        partial.add_bias(q_NHE, bias_2HE, call.scoring)
        out_NHE, lse_NH = partial.finished(sink_H, q_NHE.dtype)
        ctx.save_for_backward(q_NHE, k_MKE, v_MKE, sink_H, bias_2HE, out_NHE, lse_NH)
        ctx.mark_non_differentiable(lse_NH)
        ctx.call = call
        return out_NHE, lse_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHE: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: RingCall = ctx.call
        q_NHE, k_MKE, v_MKE, sink_H, bias_2HE, out_NHE, lse_NH = ctx.saved_tensors
        dsink_H = sink_gradient(dout_NHE, out_NHE, lse_NH, sink_H)
        queries = QueryBlock(dout_NHE, q_NHE, out_NHE, lse_NH)
        turn = _keys_travel if call.back is None else _queries_travel
        dq_NHE, dkv_M2KE = turn(queries, k_MKE, v_MKE, call)
        dbias_2HE = bias_gradients(dout_NHE, q_NHE, out_NHE, lse_NH, bias_2HE, call.scoring, dq_NHE)
        dk_MKE, dv_MKE = dkv_M2KE[:, 0].to(k_MKE.dtype), dkv_M2KE[:, 1].to(v_MKE.dtype)
        return dq_NHE.to(q_NHE.dtype), dk_MKE, dv_MKE, dsink_H, dbias_2HE, None


def _keys_travel(
    queries: QueryBlock, k_MKE: torch.Tensor, v_MKE: torch.Tensor, call: RingCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq and dkv of this rank's rows, in the wide dtype."""
    wide = queries.lse_NH.dtype
    dq_NHE = Sums.like(queries.q_NHE, wide)
    own = k_MKE.new_empty((0, 2, *k_MKE.shape[1:]), dtype=wide)
    homeward = Homeward(own, call.sizes("keys"), call.there, call.group, call.ledger)
    for step, source, kv in _blocks(k_MKE, v_MKE, call):
        dkv_M2KE = None
        if kv is not None and (step == 0 or call.there.needed[step, call.group.rank]):
            slices = call.slices(step, source, "keys")
            dkv_M2KE = gradients(*queries[:2], *kv, *queries[2:], slices, call.kernel, call.scoring, dq_NHE).finished()
        if step == 0:
            assert dkv_M2KE is not None
            own = dkv_M2KE
        else:
            homeward.add(step, dkv_M2KE)
    return dq_NHE.finished(), add_part_(own, homeward.arrived(), call.part("keys"))


def _queries_travel(
    queries: QueryBlock, k_MKE: torch.Tensor, v_MKE: torch.Tensor, call: RingCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with this rank's keys and values in place and every query block visiting them."""
    assert call.back is not None
    wide, sizes = queries.lse_NH.dtype, call.sizes("queries")
    own = Sums.like(queries.q_NHE, wide)
    dkv: Sums | None = None
    like = queries.lse_NH.new_empty((0, *queries.q_NHE.shape[1:]))
    homeward = Homeward(like, sizes, call.back, call.group, call.ledger)
    packed = pack_queries(queries, call.part("queries")) if len(call.back.steps) > 1 else queries.q_NHE
    for step, source, block in circulate(packed, sizes, call.back, call.group, call.ledger):
        slices = call.slices(step, source, "queries")
        dq_NHE = None
        if step == 0:
            dkv = gradients(*queries[:2], k_MKE, v_MKE, *queries[2:], slices, call.kernel, call.scoring, own)
            continue
        if block is not None and slices:
            visitors = unpack_queries(block, queries)
            dq = Sums.like(visitors.q_NHE, wide)
            gradients(*visitors[:2], k_MKE, v_MKE, *visitors[2:], slices, call.kernel, call.scoring, dq, dkv)
            dq_NHE = dq.finished()
        homeward.add(step, dq_NHE)
    assert dkv is not None
    return add_part_(own.finished(), homeward.arrived(), call.part("queries")), dkv.finished()


def _blocks(
    k_MKE: torch.Tensor, v_MKE: torch.Tensor, call: RingCall
) -> Iterator[tuple[int, int, tuple[torch.Tensor, torch.Tensor] | None]]:
    """Step, source and that source's keys and values, as they come: its own all, of others those that travel.

    The rank's own are copied only to be sent.
    """
    own = pack_keys(k_MKE, v_MKE, call.part("keys")) if len(call.there.steps) > 1 else k_MKE
    for step, source, block in circulate(own, call.sizes("keys"), call.there, call.group, call.ledger):
        if step == 0:
            yield step, source, (k_MKE, v_MKE)
        else:
            yield step, source, None if block is None else (block[:, 0], block[:, 1])
