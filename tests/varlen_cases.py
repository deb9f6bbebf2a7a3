"""What a kernel that takes many blocks in one call means: another kernel, block after block."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from longctx.attention.kernels import CPU_FLASH, NAIVE, Kernel, Scoring, Segments, Varlen
from longctx.attention.kernels.base import Gradients
from longctx.sequence.plan import Mask


def blocks_of(segments: Segments) -> Iterator[tuple[slice, slice, Mask]]:
    """Rows, keys and mask of every block."""
    both = zip(pairwise(segments.q_bounds), pairwise(segments.k_bounds), strict=True)
    for (top, bottom), (low, high) in both:
        yield slice(top, bottom), slice(low, high), "causal" if segments.causal else "full"


def block_by_block(kernel: Kernel) -> Varlen:
    """Many blocks through the dense functions of ``kernel``."""

    def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scoring: Scoring) -> tuple[Tensor, Tensor]:
        parts = [kernel.forward(q[r], k[c], v[c], mask, scoring) for r, c, mask in blocks_of(segments)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, scoring: Scoring
    ) -> Gradients:
        parts = [
            kernel.backward(dout[r], q[r], k[c], v[c], out[r], lse[r], mask, scoring)
            for r, c, mask in blocks_of(segments)
        ]
        dq, dk, dv = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return dq, dk, dv

    return Varlen(forward, backward)


NAIVE_VARLEN = replace(NAIVE, name="naive_varlen", tile=None, varlen=block_by_block(NAIVE))
FLASH_VARLEN = replace(CPU_FLASH, name="flash_varlen", strip=None, varlen=block_by_block(CPU_FLASH))
