"""torch's CUDA flash attention for half precision: native GQA, returns and accepts the log-sum-exp."""

import torch

from longctx.attention.kernels.base import Gradients, Kernel, flipped
from longctx.sequence.plan import Mask


def _batched(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.transpose(0, 1)[None] for t in tensors)


def forward(
    q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if mask == "anticausal":
        q, k, v = flipped(q_NHE, k_MKE, v_MKE)
        out, lse = forward(q, k, v, "causal", scale)
        return out.flip(0), lse.flip(0)
    q, k, v = _batched(q_NHE, k_MKE, v_MKE)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, mask == "causal", False, scale=scale
    )
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
    # No dropout: the two random-number arguments are placeholders, the sequence tables are for jagged input only.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse_NH.T[None].contiguous(), None, None, q.shape[2], k.shape[2], 0.0, mask == "causal",
        seed, unused, scale=scale,
    )  # fmt: skip
    return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)


CUDA_FLASH = Kernel(
    "cuda_flash", frozenset({torch.bfloat16, torch.float16}), forward, backward, head_multiple=8, head_limit=256
)
