"""torch's CPU flash attention: native GQA, returns and accepts the log-sum-exp, no score matrix.

Its traps: an empty operand crashes the process, causal means top-left aligned, a fully masked row reports lse 0. Slices
are never empty and causal ones are square, so none of the three can occur here. It works on blocks of 512 keys, hidden
ones included: a causal block below that costs as much as the whole square. Triangles are therefore cut; from 128 rows
on a square costs the same per pair as a long one, below that more.
"""

import torch

from longctx.attention.kernels.base import Gradients
from longctx.attention.kernels.dense import Operands, flash_kernel


def _forward(qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv, 0.0, causal, scale=scale)
    return out, lse


def _backward(
    dout: torch.Tensor, qkv: Operands, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
) -> Gradients:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, *qkv, out, lse, 0.0, causal, scale=scale
    )
    return dq, dk, dv


CPU_FLASH = flash_kernel(
    "cpu_flash", frozenset({torch.float64, torch.float32, torch.bfloat16}), _forward, _backward, tile=4096, triangle=128
)
