"""torch's CPU flash attention: native GQA, returns and accepts the log-sum-exp, no score matrix.

Its traps: an empty operand crashes the process, causal means top-left aligned, a fully masked row reports lse 0. Slices
are never empty and causal ones are square, so none of the three can occur here.
"""

import torch

from longctx.attention.kernels.base import Gradients, Kernel, flipped
from longctx.sequence.plan import Mask


def _batched(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[N, H, E] to the operator's [1, H, N, E], without a copy."""
    return tuple(t.transpose(0, 1)[None] for t in tensors)


def forward(
    q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if mask == "anticausal":
        q, k, v = flipped(q_NHE, k_MKE, v_MKE)
        out, lse = forward(q, k, v, "causal", scale)
        return out.flip(0), lse.flip(0)
    q, k, v = _batched(q_NHE, k_MKE, v_MKE)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask == "causal", scale=scale)
    return out[0].transpose(0, 1), lse[0].T


def backward(
    dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
    out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scale: float,
) -> Gradients:  # fmt: skip
    if mask == "anticausal":
        dout, q, k, v, out, lse = flipped(dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE, lse_NH)
        dq, dk, dv = flipped(*backward(dout, q, k, v, out, lse, "causal", scale))
        return dq, dk, dv
    dout, q, k, v, out = _batched(dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse_NH.T[None].contiguous(), 0.0, mask == "causal", scale=scale
    )
    return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)


CPU_FLASH = Kernel("cpu_flash", frozenset({torch.float64, torch.float32, torch.bfloat16}), forward, backward)
