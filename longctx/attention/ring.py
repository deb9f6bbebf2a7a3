"""Ring attention: keys and values travel around the ranks, forward and backward.

Ring Attention with Blockwise Transformers (arXiv 2310.01889), with the work cut into slices by an AttentionPlan and
the backward of FlashAttention (global out and log-sum-exp in every block). Legend: N = B*T flattened query rows, M key
rows, H query heads, K kv heads, E head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.local import Partial, gradients
from longctx.attention.merge import add_sink_, sink_gradient
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.collectives.ring import Homeward, Schedule, circulate, planned_transfers
from longctx.sequence.plan import AttentionPlan


@dataclass(frozen=True)
class RingCall:
    """Everything about one attention call that is no tensor."""

    plan: AttentionPlan
    group: Group
    ledger: Ledger | None
    kernel: Kernel
    scoring: Scoring

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.plan.last_hop)

    @property
    def sizes(self) -> list[int]:
        """Flattened key rows of every rank."""
        return [len(self.plan.documents) * size for size in self.plan.keys.sizes]


class RingAttention(torch.autograd.Function):
    """q_NHE, k_MKE, v_MKE, sink_H -> out_NHE. Saves them, out and lse; the backward sends keys and values again."""

    @staticmethod
    def forward(
        ctx: Any, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, sink_H: torch.Tensor | None,
        call: RingCall,
    ) -> torch.Tensor:  # fmt: skip
        partial = Partial.empty(q_NHE)
        for _, source, kv in _blocks(k_MKE, v_MKE, call):
            if kv is None:
                continue
            partial.attend(q_NHE, *kv, call.plan.slices(call.group.rank, source), call.kernel, call.scoring)
        if sink_H is not None:
            add_sink_(partial.out_NHE, partial.lse_NH, sink_H)
        out_NHE = partial.out_NHE.to(q_NHE.dtype)
        ctx.save_for_backward(q_NHE, k_MKE, v_MKE, sink_H, out_NHE, partial.lse_NH)
        ctx.call = call
        return out_NHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: RingCall = ctx.call
        q_NHE, k_MKE, v_MKE, sink_H, out_NHE, lse_NH = ctx.saved_tensors
        dq_NHE = torch.zeros_like(q_NHE, dtype=lse_NH.dtype)
        own = k_MKE.new_empty((0, 2, *k_MKE.shape[1:]), dtype=lse_NH.dtype)
        homeward = Homeward(own, call.sizes, call.schedule, call.group, call.ledger)
        for hop, source, kv in _blocks(k_MKE, v_MKE, call):
            dkv_M2KE = None
            if kv is not None:
                slices = call.plan.slices(call.group.rank, source)
                dkv_M2KE = gradients(dout_NHE, q_NHE, *kv, out_NHE, lse_NH, slices, call.kernel, call.scoring, dq_NHE)
            if hop == 0:
                assert dkv_M2KE is not None
                own = dkv_M2KE
            else:
                homeward.add(hop, dkv_M2KE)
        arrived = homeward.arrived()
        if arrived is not None:
            own += arrived
        dsink_H = None
        if sink_H is not None:
            dsink_H = sink_gradient(dout_NHE, out_NHE, lse_NH, sink_H).to(sink_H.dtype)
        return dq_NHE.to(q_NHE.dtype), own[:, 0].to(k_MKE.dtype), own[:, 1].to(v_MKE.dtype), dsink_H, None


def _blocks(
    k_MKE: torch.Tensor, v_MKE: torch.Tensor, call: RingCall
) -> Iterator[tuple[int, int, tuple[torch.Tensor, torch.Tensor] | None]]:
    """Hop, source and that source's keys and values, as they come; the rank's own are copied only to be sent."""
    own = torch.stack((k_MKE, v_MKE), dim=1) if call.schedule.hops else k_MKE
    for hop, source, block in circulate(own, call.sizes, call.schedule, call.group, call.ledger):
        if hop == 0:
            yield hop, source, (k_MKE, v_MKE)
        else:
            yield hop, source, None if block is None else (block[:, 0], block[:, 1])


def planned_traffic(plan: AttentionPlan, rank: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Transfer]:
    """The transfers of one forward and one backward of ring attention on ``rank``, in order."""
    call_sizes = [len(plan.documents) * size for size in plan.keys.sizes]
    numbers = 2 * kv_heads * head_dim
    wide = torch.promote_types(dtype, torch.float32)
    schedule = Schedule(plan.last_hop)
    forward = planned_transfers(rank, schedule, call_sizes, numbers * dtype.itemsize)
    return forward + planned_transfers(rank, schedule, call_sizes, numbers * dtype.itemsize, numbers * wide.itemsize)
