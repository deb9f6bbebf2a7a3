"""torch's CUDA flash attention for half precision: native GQA, returns and accepts the log-sum-exp."""

import torch

from longctx.attention.kernels.base import Gradients, Operands, flash_kernel


def _forward(qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*qkv, 0.0, causal, False, scale=scale)
    return out, lse


def _backward(
    dout: torch.Tensor, qkv: Operands, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
) -> Gradients:
    q, k, v = qkv
    # No dropout: the two random-number arguments are placeholders, the sequence tables are for jagged input only.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, unused, scale=scale
    )
    return dq, dk, dv


CUDA_FLASH = flash_kernel(
    "cuda_flash", frozenset({torch.bfloat16, torch.float16}), _forward, _backward, head_multiple=8, head_limit=256
)
