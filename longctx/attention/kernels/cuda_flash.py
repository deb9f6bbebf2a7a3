"""torch's CUDA flash attention for half precision: native GQA, many blocks in one call, takes the log-sum-exp back.

Written against the schemas of torch 2.13; not run on a GPU.
"""

import torch

from longctx.attention.kernels.base import Gradients, Scoring, Segments, Varlen
from longctx.attention.kernels.varlen import HALF, compute_capability, varlen_kernel


def _forward(
    q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, segments: Segments, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        q_NHE, k_MKE, v_MKE, *segments.tables(q_NHE.device), *segments.longest, 0.0, segments.causal, False,
        scale=scoring.scale,
    )  # fmt: skip
    return out, lse_HN.T


def _backward(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
    out_NHE: torch.Tensor, lse_NH: torch.Tensor, segments: Segments, scoring: Scoring,
) -> Gradients:  # fmt: skip
    # No dropout: the two random-number arguments are placeholders.
    seed = torch.zeros(2, dtype=torch.uint64, device=q_NHE.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q_NHE.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE, lse_NH.T.contiguous(), *segments.tables(q_NHE.device),
        *segments.longest, 0.0, segments.causal, seed, unused, scale=scoring.scale,
    )  # fmt: skip
    return dq, dk, dv


def _found(device: torch.device) -> bool:
    built = not torch.cuda.is_available() or torch.backends.cuda.is_flash_attention_available()
    return built and compute_capability(device) >= 8


CUDA_FLASH = varlen_kernel(
    "cuda_flash", HALF, Varlen(_forward, _backward), head_multiple=8, head_limit=256, found=_found
)
