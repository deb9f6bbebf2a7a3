"""Kernels: one file per backend, one signature. The choice depends on device, dtype, soft cap and what is installed."""

import warnings

import torch

from longctx.attention.kernels.base import Kernel, Scoring, Segments, Varlen
from longctx.attention.kernels.cpu_flash import CPU_FLASH
from longctx.attention.kernels.cuda_flash import CUDA_FLASH
from longctx.attention.kernels.cudnn import CUDNN
from longctx.attention.kernels.flash_attn2 import FLASH_ATTN_2
from longctx.attention.kernels.flash_attn3 import FLASH_ATTN_3
from longctx.attention.kernels.naive import NAIVE
from longctx.errors import UnsupportedError

__all__ = [
    "CPU_FLASH", "CUDA_FLASH", "CUDNN", "FLASH_ATTN_2", "FLASH_ATTN_3", "NAIVE", "Kernel", "Scoring", "Segments",
    "Varlen", "choose_kernel", "kernels_of",
]  # fmt: skip


def kernels_of(device: torch.device) -> tuple[Kernel, ...]:
    """What can run on ``device``, fastest first; empty for a device that no kernel knows."""
    known = {"cpu": (CPU_FLASH, NAIVE), "cuda": (FLASH_ATTN_3, FLASH_ATTN_2, CUDA_FLASH, CUDNN, NAIVE)}
    return tuple(kernel for kernel in known.get(device.type, ()) if kernel.found(device))


def choose_kernel(device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> Kernel:
    """The fastest kernel for tensors of ``dtype`` on ``device`` that honours ``softcap``.

    Raises:
        UnsupportedError: no kernel works in this dtype on this device.
    """
    for kernel in kernels_of(device):
        if dtype not in kernel.dtypes or (softcap is not None and not kernel.softcaps):
            continue
        if kernel is NAIVE:
            what = f"{dtype}" if softcap is None else f"softcap = {softcap} in {dtype}"
            warnings.warn(f"attention with {what} on {device.type} runs in the slow naive kernel", stacklevel=2)
        return kernel
    raise UnsupportedError(f"no attention kernel for {dtype} on {device.type}; use float32 or bfloat16 on cpu or cuda")
