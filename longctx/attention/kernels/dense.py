"""Kernels around torch's flash operators on dense blocks, which know no anticausal mask: both axes are flipped for it.

Legend: N query rows, M key rows, H query heads, K kv heads, E head dim.
"""

from typing import Any, Protocol

import torch

from longctx.attention.kernels.base import Gradients, Kernel, Scoring, flipping
from longctx.sequence.plan import Mask

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FlashForward(Protocol):
    """torch's layout: [1, heads, rows, E] in, the output so and its log-sum-exp [1, H, N] out."""

    def __call__(self, qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]: ...


class FlashBackward(Protocol):
    """Gradients of q, k, v [1, heads, rows, E]."""

    def __call__(
        self, dout: torch.Tensor, qkv: Operands, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
    ) -> Gradients: ...


def flash_kernel(
    name: str, dtypes: frozenset[torch.dtype], flash_forward: FlashForward, flash_backward: FlashBackward, **limits: Any
) -> Kernel:
    """A kernel around two operators; ``limits`` are further fields of :class:`Kernel`."""

    def forward(
        q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (_batched(t) for t in (q_NHE, k_MKE, v_MKE))
        out, lse = flash_forward((q, k, v), mask == "causal", scoring.scale)
        return out[0].transpose(0, 1), lse[0].T

    def backward(
        dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients:  # fmt: skip
        dout, q, k, v, out = (_batched(t) for t in (dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE))
        lse = lse_NH.T[None].contiguous()
        dq, dk, dv = flash_backward(dout, (q, k, v), out, lse, mask == "causal", scoring.scale)
        return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)

    return Kernel(name, dtypes, *flipping(forward, backward), **limits)


def _batched(t_NHE: torch.Tensor) -> torch.Tensor:
    """[N, H, E] as [1, H, N, E], without a copy."""
    return t_NHE.transpose(0, 1)[None]
