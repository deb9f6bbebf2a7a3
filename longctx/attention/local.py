"""A rank's own work on one block of keys: run the kernel over its slices, accumulate in fp32 (fp64 for fp64)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from longctx.attention.kernels import Kernel, Scoring
from longctx.attention.merge import merge_
from longctx.sequence.plan import Slice


@dataclass
class Partial:
    """Accumulators of one rank's queries: out_NHE and lse_NH over the keys seen so far, and which rows saw any."""

    out_NHE: torch.Tensor
    lse_NH: torch.Tensor
    seen_N: npt.NDArray[np.bool_]

    @staticmethod
    def empty(q_NHE: torch.Tensor) -> "Partial":
        wide = torch.promote_types(q_NHE.dtype, torch.float32)
        out = torch.zeros(q_NHE.shape, dtype=wide, device=q_NHE.device)
        return Partial(out, out.new_full(q_NHE.shape[:2], float("-inf")), np.zeros(q_NHE.shape[0], dtype=bool))

    def attend(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, slices: Sequence[Slice], kernel: Kernel,
        scoring: Scoring,
    ) -> None:  # fmt: skip
        """Add the keys of one block."""
        for s in tiles(slices, kernel.tile):
            rows, columns = slice(s.q_start, s.q_end), slice(s.k_start, s.k_end)
            out, lse = kernel.forward(q_NHE[rows], k_MKE[columns], v_MKE[columns], s.mask, scoring)
            if self.seen_N[rows].any():
                merge_(self.out_NHE[rows], self.lse_NH[rows], out, lse)
            else:
                self.out_NHE[rows], self.lse_NH[rows] = out, lse
            self.seen_N[rows] = True


def gradients(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, out_NHE: torch.Tensor,
    lse_NH: torch.Tensor, slices: Sequence[Slice], kernel: Kernel, scoring: Scoring, dq_NHE: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Add this block's share to ``dq_NHE`` and return its dk and dv, stacked [M, 2, K, E], in the wide dtype."""
    dkv_M2KE = torch.zeros(k_MKE.shape[0], 2, *k_MKE.shape[1:], dtype=dq_NHE.dtype, device=dq_NHE.device)
    for s in tiles(slices, kernel.tile):
        rows, columns = slice(s.q_start, s.q_end), slice(s.k_start, s.k_end)
        dq, dk, dv = kernel.backward(
            dout_NHE[rows], q_NHE[rows], k_MKE[columns], v_MKE[columns], out_NHE[rows], lse_NH[rows], s.mask, scoring
        )
        dq_NHE[rows] += dq
        dkv_M2KE[columns, 0] += dk
        dkv_M2KE[columns, 1] += dv
    return dkv_M2KE


def tiles(slices: Sequence[Slice], size: int | None) -> Iterator[Slice]:
    """The same work in slices of at most ``size`` rows and columns, or as it is (None)."""
    for s in slices:
        if size is None:
            yield s
            continue
        for q in range(s.q_start, s.q_end, size):
            for k in range(s.k_start, s.k_end, size):
                # A triangle is square, so its diagonal runs through tiles of equal place, and one side of it is empty.
                ahead = (k - s.k_start) - (q - s.q_start)
                if (s.mask == "causal" and ahead > 0) or (s.mask == "anticausal" and ahead < 0):
                    continue
                yield Slice(q, min(q + size, s.q_end), k, min(k + size, s.k_end), "full" if ahead else s.mask)
