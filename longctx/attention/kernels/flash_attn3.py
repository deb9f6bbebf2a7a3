"""flash-attn 3 where it is installed, on Hopper only: native GQA, many blocks in one call, soft-capping.

Written from the source of its first betas, whose functions require every argument, and of the later operators, which
have defaults and renamed some; not run on a GPU.
"""

import torch

from longctx.attention.kernels.varlen import HALF, compute_capability, imported, installed, varlen_kernel


def _found(device: torch.device) -> bool:
    return installed("flash_attn_interface") and compute_capability(device) == 9


FLASH_ATTN_3 = varlen_kernel(
    "flash_attn_3", HALF, imported("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    head_multiple=8, head_limit=256, softcaps=True, found=_found,
)  # fmt: skip
