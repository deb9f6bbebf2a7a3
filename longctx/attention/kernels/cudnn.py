"""cuDNN's flash attention through torch, for half precision: native GQA, one dense block a call.

cuDNN compiles a plan for every shape it meets, so many different slices start slowly. Written against the schemas of
torch 2.13; not run on a GPU.
"""

import torch

from longctx.attention.kernels.base import Gradients
from longctx.attention.kernels.dense import Operands, flash_kernel
from longctx.attention.kernels.varlen import HALF, compute_capability


def _forward(qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse_1HN1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *qkv, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse_1HN1.squeeze(-1)


def _backward(
    dout: torch.Tensor, qkv: Operands, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
) -> Gradients:
    q, k, v = qkv
    # No dropout, no bias, no jagged input: placeholders for their numbers and tables.
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse[..., None], seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def _found(device: torch.device) -> bool:
    return compute_capability(device) >= 8


CUDNN = flash_kernel("cudnn", HALF, _forward, _backward, head_multiple=8, head_limit=128, found=_found)
