"""A rank's own work on one block of keys: run the kernel over its slices, accumulate in fp32 (fp64 for fp64)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longctx.attention.bias import add_bias_
from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.kernels.base import Gradients
from longctx.attention.merge import add_sink_, merge_
from longctx.attention.steps import Blocks, Rows, Step, steps_of
from longctx.attention.sums import Seen, Sums
from longctx.sequence.plan import Slice


@dataclass
class Partial:
    """Accumulators of one rank's queries: out_NHE and lse_NH over the keys seen so far, and which rows saw any.

    The output of the other rows is undefined until :meth:`finished`.
    """

    out_NHE: torch.Tensor
    lse_NH: torch.Tensor
    seen: Seen

    @staticmethod
    def empty(q_NHE: torch.Tensor) -> "Partial":
        wide = torch.promote_types(q_NHE.dtype, torch.float32)
        out = torch.empty(q_NHE.shape, dtype=wide, device=q_NHE.device)
        return Partial(out, out.new_full(q_NHE.shape[:2], float("-inf")), Seen(q_NHE.shape[0]))

    def attend(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, slices: Sequence[Slice], kernel: Kernel,
        scoring: Scoring,
    ) -> None:  # fmt: skip
        """Add the keys of one block."""
        for step in steps_of(slices, kernel):
            self._add(step.rows, *_forward(kernel, step, q_NHE, k_MKE, v_MKE, scoring))

    def add_bias(self, q_NHE: torch.Tensor, bias_2HE: torch.Tensor | None, scoring: Scoring) -> None:
        """Add the key and value that every row sees, if there are any; once."""
        if bias_2HE is not None:
            self.seen.clear_rest((self.out_NHE,))
            add_bias_(self.out_NHE, self.lse_NH, q_NHE, bias_2HE, scoring)

    def finished(self, sink_H: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """out_NHE in ``dtype`` and lse_NH, the sink included; after all keys."""
        self.seen.clear_rest((self.out_NHE,))
        if sink_H is not None:
            add_sink_(self.out_NHE, self.lse_NH, sink_H)
        return self.out_NHE.to(dtype), self.lse_NH

    def _add(self, rows: Rows | Blocks, out: torch.Tensor, lse: torch.Tensor) -> None:
        if self.seen.first(rows, (self.out_NHE,)):
            rows.assign_(self.out_NHE, out)
            rows.assign_(self.lse_NH, lse)
            return
        total_out, total_lse = rows.of(self.out_NHE), rows.of(self.lse_NH)
        merge_(total_out, total_lse, out, lse)
        if not rows.views:
            rows.assign_(self.out_NHE, total_out)
            rows.assign_(self.lse_NH, total_lse)


def gradients(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, out_NHE: torch.Tensor,
    lse_NH: torch.Tensor, slices: Sequence[Slice], kernel: Kernel, scoring: Scoring, dq_NHE: Sums,
    dkv_M2KE: Sums | None = None,
) -> Sums:  # fmt: skip
    """Add this block's share to ``dq_NHE``, and to its dk and dv, stacked [M, 2, K, E], in the wide dtype.

    Args:
        dkv_M2KE: what other queries have added to dk and dv; None: none have yet.
    """
    dkv_M2KE = dkv_M2KE or Sums.pair(k_MKE, lse_NH.dtype)
    for step in steps_of(slices, kernel, backward=True):
        dq, dk, dv = _backward(kernel, step, dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE, lse_NH, scoring)
        dq_NHE.add(step.rows, dq)
        dkv_M2KE.add(step.columns, dk, dv)
    return dkv_M2KE


def _forward(
    kernel: Kernel, step: Step, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = step.rows.of(q_NHE), step.columns.of(k_MKE), step.columns.of(v_MKE)
    if step.segments is None:
        return kernel.forward(q, k, v, step.mask, scoring)
    assert kernel.varlen is not None
    return kernel.varlen.forward(q, k, v, step.segments, scoring)


def _backward(
    kernel: Kernel, step: Step, dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
    out_NHE: torch.Tensor, lse_NH: torch.Tensor, scoring: Scoring,
) -> Gradients:  # fmt: skip
    dout, q, out, lse = (step.rows.of(t) for t in (dout_NHE, q_NHE, out_NHE, lse_NH))
    k, v = step.columns.of(k_MKE), step.columns.of(v_MKE)
    if step.segments is None:
        return kernel.backward(dout, q, k, v, out, lse, step.mask, scoring)
    assert kernel.varlen is not None
    return kernel.varlen.backward(dout, q, k, v, out, lse, step.segments, scoring)
