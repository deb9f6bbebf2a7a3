"""flash-attn 2 where it is installed: native GQA, many blocks in one call, soft-capping.

Written from the source of flash-attn 2.7 and 2.8; not run on a GPU.
"""

import torch

from longctx.attention.kernels.varlen import HALF, compute_capability, imported, installed, varlen_kernel


def _found(device: torch.device) -> bool:
    return installed("flash_attn") and compute_capability(device) >= 8


FLASH_ATTN_2 = varlen_kernel(
    "flash_attn_2", HALF,
    imported("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    head_multiple=8, head_limit=256, softcaps=True, found=_found,
)  # fmt: skip
