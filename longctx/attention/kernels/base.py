"""The one signature of all kernels.

A kernel works on one dense block: N queries over M keys of the same document, never empty. Legend: N query rows,
M key rows, H query heads, K kv heads, E head dim.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from longctx.sequence.plan import Mask

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Forward(Protocol):
    """Returns out_NHE in the query's dtype and lse_NH in fp32 (fp64 for fp64); rows without a key: 0 and -inf."""

    def __call__(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Backward(Protocol):
    """Returns dq_NHE, dk_MKE, dv_MKE of this block; ``out`` and ``lse`` are those of the whole row, over all blocks."""

    def __call__(
        self, dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scale: float,
    ) -> Gradients: ...  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A backend: its name, the dtypes it takes, and its two functions."""

    name: str
    dtypes: frozenset[torch.dtype]
    forward: Forward
    backward: Backward


def flipped(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Reverse the rows: an anticausal triangle is a causal one with both axes flipped."""
    return tuple(t.flip(0) for t in tensors)
