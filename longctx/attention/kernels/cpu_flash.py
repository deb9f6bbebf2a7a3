"""torch's CPU flash attention: native GQA, returns and accepts the log-sum-exp, no score matrix.

Its traps: an empty operand crashes the process, causal means top-left aligned, a fully masked row reports lse 0. Blocks
are never empty, those that are not square come with a mask in place of the flag, and every row sees a key, so none of
the three can occur here. A mask is added to scores: a key that is no finite number reaches the rows of its strip that
are before it, as a value that is none reaches those of its block with the flag, too.

It works on blocks of 512 keys, hidden ones included, so that a causal block below that costs as much as the whole
square; and in blocks of 32 rows where there are few. Triangles therefore come as strips of 32 rows, with a mask. A
backward of 448 keys at a time is some 8 percent faster than one of 512, whose intermediate rows fall on each other's
places in the cache.
"""

from functools import lru_cache

import torch

from longctx.attention.kernels.base import Gradients
from longctx.attention.kernels.dense import Operands, flash_kernel


def _forward(qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _mask(qkv, causal)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *qkv, 0.0, causal and mask is None, attn_mask=mask, scale=scale
    )
    return out, lse


def _backward(
    dout: torch.Tensor, qkv: Operands, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
) -> Gradients:
    mask = _mask(qkv, causal)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, *qkv, out, lse, 0.0, causal and mask is None, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def _mask(qkv: Operands, causal: bool) -> torch.Tensor | None:
    """What a causal block adds to its scores, where there are more keys than rows."""
    q, rows, columns = qkv[0], qkv[0].shape[2], qkv[1].shape[2]
    return _trapezoid(rows, columns, q.dtype, q.device) if causal and rows != columns else None


@lru_cache(maxsize=1024)
def _trapezoid(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((rows, columns), float("-inf"), dtype=dtype, device=device).triu(columns - rows + 1)


CPU_FLASH = flash_kernel(
    "cpu_flash", frozenset({torch.float64, torch.float32, torch.bfloat16}), _forward, _backward,
    tile=(4096, 4096), backward_tile=(2048, 448), strip=(32, 224),
)  # fmt: skip
