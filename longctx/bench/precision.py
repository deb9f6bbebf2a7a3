"""How rounding grows with the size of a ring: the error of attention over P ranks against that of one kernel call.

Both are measured against fp64 on the same rounded inputs, as the root mean square over all entries. What a kernel hands
out per block decides: fp32 parts are joined without loss, bf16 parts are rounded once per block.

Legend: S tokens, H query heads, K kv heads, E head dim.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.attention.kernels import CPU_FLASH, NAIVE, Kernel, Scoring
from longctx.bench.virtual_ring import VirtualRing, cut, joined
from longctx.sequence.layout import zigzag
from longctx.sequence.plan import AttentionPlan, Mask

RING_SIZES = (1, 2, 4, 8, 16, 32, 64)
PARTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Growth:
    """Errors of a ring of ``ranks``, each divided by that of one kernel call over the whole sequence."""

    ranks: int
    out: float
    dq: float
    dk: float
    dv: float

    @property
    def worst(self) -> float:
        return max(self.out, self.dq, self.dk, self.dv)


def error_growth(
    kernel: Kernel, sizes: Sequence[int] = RING_SIZES, *, length: int = 2048, heads: int = 4, kv_heads: int = 2,
    head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, causal: bool = True, seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Growth]:  # fmt: skip
    """Errors of simulated zigzag rings of ``sizes`` ranks in ``dtype``, relative to one call of ``kernel``.

    Raises:
        UnsupportedError: the kernel does not take the dtype or the head size.
    """
    kernel.check(dtype, head_dim)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, count, head_dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    scoring = Scoring(head_dim**-0.5)
    exact = _ring(NAIVE, 1, causal, scoring, *(t.double() for t in (q, k, v, dout)))
    mask: Mask = "causal" if causal else "full"
    out, lse = kernel.forward(q, k, v, mask, scoring)
    out = out.to(dtype)
    alone = [out, *(t.to(dtype) for t in kernel.backward(dout, q, k, v, out, lse, mask, scoring))]
    base = [_error(t, e) for t, e in zip(alone, exact, strict=True)]
    rows = []
    for size in sizes:
        found = _ring(kernel, size, causal, scoring, q, k, v, dout)
        errors = (_error(t, e) / b for t, e, b in zip(found, exact, base, strict=True))
        rows.append(Growth(size, *errors))
    return rows


def error_curve(
    kernels: Sequence[Kernel] = (CPU_FLASH, NAIVE), sizes: Sequence[int] = RING_SIZES
) -> list[dict[str, Any]]:
    """:func:`error_growth` of several kernels on the CPU as plain values: kernel, ranks, out, dq, dk, dv."""
    return [{"kernel": kernel.name, **asdict(row)} for kernel in kernels for row in error_growth(kernel, sizes)]


def table(curve: Sequence[dict[str, Any]]) -> list[str]:
    """The curve as lines of text: bf16 error over that of one call."""
    lines = ["| kernel | ranks | " + " | ".join(PARTS) + " |", "|---|---:|" + "---:|" * len(PARTS)]
    for row in curve:
        lines.append(f"| {row['kernel']} | {row['ranks']} | " + " | ".join(f"{row[p]:.3f}" for p in PARTS) + " |")
    return lines


def _ring(
    kernel: Kernel, size: int, causal: bool, scoring: Scoring, q_SHE: Tensor, k_SKE: Tensor, v_SKE: Tensor,
    dout_SHE: Tensor,
) -> list[Tensor]:  # fmt: skip
    """out, dq, dk, dv in global order."""
    layout = zigzag(q_SHE.shape[0], size)
    ring = VirtualRing(AttentionPlan(layout, layout, ((0,),), causal), kernel, scoring)
    q, k, v, dout = (cut(t, layout) for t in (q_SHE, k_SKE, v_SKE, dout_SHE))
    out, lse = ring.forward(q, k, v)
    return [joined(t, layout) for t in (out, *ring.backward(dout, q, k, v, out, lse))]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).square().mean().sqrt())
