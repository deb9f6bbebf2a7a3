"""Attention with all keys and values on every rank: one gather, no ring. For short keys, or keys that many layers read.

Llama 3's context parallelism (arXiv 2407.21783, 3.3.2). Holds O(S) keys and values per rank, forward to backward.

Legend: N query rows, M key rows of all ranks in global order, H query heads, K kv heads, E head dim.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from longctx.attention.bias import bias_gradients
from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.local import Partial, gradients
from longctx.attention.merge import sink_gradient
from longctx.attention.sums import Sums
from longctx.sequence.collectives.gather import GatherRows
from longctx.sequence.plan import AttentionPlan


class GatheredCall:
    """Everything about one call that is no tensor: a plan over one source of keys, and how they come together."""

    def __init__(self, plan: AttentionPlan, rank: int, rows: GatherRows, kernel: Kernel, scoring: Scoring) -> None:
        self.slices = plan.slices(rank, 0)
        self.rows, self.kernel, self.scoring = rows, kernel, scoring


class GatheredAttention(torch.autograd.Function):
    """q_NHE, own k and v, sink_H, bias_2HE -> out_NHE, lse_NH.

    Keeps the gathered keys and values: nothing is gathered twice.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHE: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink_H: torch.Tensor | None,
        bias_2HE: torch.Tensor | None, call: GatheredCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return _attend(ctx, q_NHE, call.rows.gather(torch.stack((k, v), dim=1)), sink_H, bias_2HE, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHE: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq_NHE, dkv_M2KE, dsink_H, dbias_2HE = _gradients(ctx, dout_NHE)
        own = ctx.call.rows.scatter_sum(dkv_M2KE).to(dq_NHE.dtype)
        return dq_NHE, own[:, 0], own[:, 1], dsink_H, dbias_2HE, None


class WholeAttention(torch.autograd.Function):
    """q_NHE, kv_M2KE that :class:`GatherKeys` has gathered -> out_NHE, lse_NH. Nothing is sent."""

    @staticmethod
    def forward(
        ctx: Any, q_NHE: torch.Tensor, kv_M2KE: torch.Tensor, sink_H: torch.Tensor | None,
        bias_2HE: torch.Tensor | None, call: GatheredCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return _attend(ctx, q_NHE, kv_M2KE, sink_H, bias_2HE, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHE: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dq_NHE, dkv_M2KE, dsink_H, dbias_2HE = _gradients(ctx, dout_NHE)
        return dq_NHE, dkv_M2KE.to(dq_NHE.dtype), dsink_H, dbias_2HE, None


class GatherKeys(torch.autograd.Function):
    """Own kv_N2KE -> kv_M2KE of all ranks. Their gradient, summed over all that read them, is then summed over ranks.

    The latter in fp32 (fp64); what several layers add is rounded to the keys' dtype, as that of any tensor they share.
    """

    @staticmethod
    def forward(ctx: Any, kv_N2KE: torch.Tensor, rows: GatherRows) -> torch.Tensor:
        ctx.rows = rows
        return rows.gather(kv_N2KE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkv_M2KE: torch.Tensor) -> tuple[torch.Tensor, None]:
        wide = torch.promote_types(dkv_M2KE.dtype, torch.float32)
        return ctx.rows.scatter_sum(dkv_M2KE.to(wide)).to(dkv_M2KE.dtype), None


def _attend(
    ctx: Any, q_NHE: torch.Tensor, kv_M2KE: torch.Tensor, sink_H: torch.Tensor | None, bias_2HE: torch.Tensor | None,
    call: GatheredCall,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    partial = Partial.empty(q_NHE)
    partial.attend(q_NHE, kv_M2KE[:, 0], kv_M2KE[:, 1], call.slices, call.kernel, call.scoring)
    partial.add_bias(q_NHE, bias_2HE, call.scoring)
    out_NHE, lse_NH = partial.finished(sink_H, q_NHE.dtype)
    ctx.save_for_backward(q_NHE, kv_M2KE, sink_H, bias_2HE, out_NHE, lse_NH)
    ctx.mark_non_differentiable(lse_NH)
    ctx.call = call
    return out_NHE, lse_NH


def _gradients(
    ctx: Any, dout_NHE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dq in its dtype, dkv of this rank's queries in the wide one, and those of the sink and of the bias."""
    call: GatheredCall = ctx.call
    q_NHE, kv_M2KE, sink_H, bias_2HE, out_NHE, lse_NH = ctx.saved_tensors
    dsink_H = sink_gradient(dout_NHE, out_NHE, lse_NH, sink_H)
    dq = Sums.like(q_NHE, lse_NH.dtype)
    dkv = gradients(
        dout_NHE, q_NHE, kv_M2KE[:, 0], kv_M2KE[:, 1], out_NHE, lse_NH, call.slices, call.kernel, call.scoring, dq
    )
    dq_NHE, dkv_M2KE = dq.finished(), dkv.finished()
    dbias_2HE = bias_gradients(dout_NHE, q_NHE, out_NHE, lse_NH, bias_2HE, call.scoring, dq_NHE)
    return dq_NHE.to(q_NHE.dtype), dkv_M2KE, dsink_H, dbias_2HE
