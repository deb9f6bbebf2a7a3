"""A rank's own work on one block of keys: run the kernel over its slices, accumulate in fp32 (fp64 for fp64)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from longctx.attention.kernels import Kernel
from longctx.attention.merge import merge_
from longctx.sequence.plan import Slice


@dataclass
class Partial:
    """Accumulators of one rank's queries: out_NHE and lse_NH over the keys seen so far."""

    out_NHE: torch.Tensor
    lse_NH: torch.Tensor
    _touched: list[tuple[int, int]] = field(default_factory=list)

    @staticmethod
    def empty(q_NHE: torch.Tensor) -> "Partial":
        wide = torch.promote_types(q_NHE.dtype, torch.float32)
        out = torch.zeros(q_NHE.shape, dtype=wide, device=q_NHE.device)
        return Partial(out, out.new_full(q_NHE.shape[:2], float("-inf")))

    def attend(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, slices: Sequence[Slice], kernel: Kernel,
        scale: float,
    ) -> None:  # fmt: skip
        """Add the keys of one block."""
        for s in slices:
            rows, columns = slice(s.q_start, s.q_end), slice(s.k_start, s.k_end)
            out, lse = kernel.forward(q_NHE[rows], k_MKE[columns], v_MKE[columns], s.mask, scale)
            if self._first(s.q_start, s.q_end):
                self.out_NHE[rows], self.lse_NH[rows] = out, lse
            else:
                merge_(self.out_NHE[rows], self.lse_NH[rows], out, lse)

    def _first(self, start: int, end: int) -> bool:
        """Whether rows [start, end) have seen no key yet; then a copy does, and one block stays bit-exact."""
        fresh = all(end <= a or b <= start for a, b in self._touched)
        self._touched.append((start, end))
        return fresh


def gradients(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, out_NHE: torch.Tensor,
    lse_NH: torch.Tensor, slices: Sequence[Slice], kernel: Kernel, scale: float, dq_NHE: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Add this block's share to ``dq_NHE`` and return its dk and dv, stacked [M, 2, K, E], in the wide dtype."""
    dkv_M2KE = torch.zeros(k_MKE.shape[0], 2, *k_MKE.shape[1:], dtype=dq_NHE.dtype, device=dq_NHE.device)
    for s in slices:
        rows, columns = slice(s.q_start, s.q_end), slice(s.k_start, s.k_end)
        dq, dk, dv = kernel.backward(
            dout_NHE[rows], q_NHE[rows], k_MKE[columns], v_MKE[columns], out_NHE[rows], lse_NH[rows], s.mask, scale
        )
        dq_NHE[rows] += dq
        dkv_M2KE[columns, 0] += dk
        dkv_M2KE[columns, 1] += dv
    return dkv_M2KE
