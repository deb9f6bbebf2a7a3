"""Kernels: one file per backend, one signature. The choice depends on the device and dtype alone."""

import warnings

import torch

from longctx.attention.kernels.base import Kernel, Scoring
from longctx.attention.kernels.cpu_flash import CPU_FLASH
from longctx.attention.kernels.cuda_flash import CUDA_FLASH
from longctx.attention.kernels.naive import NAIVE
from longctx.errors import UnsupportedError

__all__ = ["CPU_FLASH", "CUDA_FLASH", "NAIVE", "Kernel", "Scoring", "choose_kernel"]


def choose_kernel(device: torch.device, dtype: torch.dtype, softcap: float | None = None) -> Kernel:
    """The fastest kernel for tensors of ``dtype`` on ``device`` that honours ``softcap``.

    Raises:
        UnsupportedError: no kernel works in this dtype on this device.
    """
    kernels = {"cpu": (CPU_FLASH, NAIVE), "cuda": (CUDA_FLASH, NAIVE)}.get(device.type, ())
    for kernel in kernels:
        if dtype not in kernel.dtypes or (softcap is not None and not kernel.softcaps):
            continue
        if kernel is NAIVE:
            what = f"{dtype}" if softcap is None else f"softcap = {softcap} in {dtype}"
            warnings.warn(f"attention with {what} on {device.type} runs in the slow naive kernel", stacklevel=2)
        return kernel
    raise UnsupportedError(f"no attention kernel for {dtype} on {device.type}; use float32 or bfloat16 on cpu or cuda")
