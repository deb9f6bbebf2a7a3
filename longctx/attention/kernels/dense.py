"""Kernels around torch's flash operators on dense blocks, which know no anticausal mask: both axes are flipped for it.

Legend: N query rows, M key rows, H query heads, K kv heads, E head dim.
"""

from typing import Any, Protocol

import torch

from longctx.attention.kernels.base import Gradients, Kernel, Scoring, flipping
from longctx.sequence.plan import Mask

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FlashForward(Protocol):
    """torch's layout: [blocks, heads, rows, E] in, the output so and its log-sum-exp [blocks, H, N] out."""

    def __call__(self, qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]: ...


class FlashBackward(Protocol):
    """Gradients of q, k, v [blocks, heads, rows, E]."""

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
        q, k, v = (_heads_first(t) for t in (q_NHE, k_MKE, v_MKE))
        out, lse = (t.transpose(1, 2) for t in flash_forward((q, k, v), mask == "causal", scoring.scale))
        return (out, lse) if q_NHE.dim() == 4 else (out[0], lse[0])

    def backward(
        dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients:  # fmt: skip
        dout, q, k, v, out = (_heads_first(t) for t in (dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE))
        lse = lse_NH.transpose(-1, -2).contiguous().view(q.shape[:3])
        gradients = flash_backward(dout, (q, k, v), out, lse, mask == "causal", scoring.scale)
        dq, dk, dv = (t.transpose(1, 2) for t in gradients)
        return (dq, dk, dv) if q_NHE.dim() == 4 else (dq[0], dk[0], dv[0])

    return Kernel(name, dtypes, *flipping(forward, backward), **limits)


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    """[N, H, E], or blocks of it [B, N, H, E], as [B, H, N, E] without a copy."""
    return (t if t.dim() == 4 else t[None]).transpose(1, 2)
