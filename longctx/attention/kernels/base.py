"""The one signature of all kernels.

A kernel works on one dense block: N queries over M keys of the same document, never empty. Legend: N query rows,
M key rows, H query heads, K kv heads, E head dim.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from longctx.errors import UnsupportedError
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
    """A backend: its name, the dtypes and head sizes it takes, and its two functions."""

    name: str
    dtypes: frozenset[torch.dtype]
    forward: Forward
    backward: Backward
    head_multiple: int = 1
    head_limit: int | None = None

    def check(self, dtype: torch.dtype, head_dim: int) -> None:
        """Refuse what this kernel does not take.

        Raises:
            UnsupportedError: the dtype or the head size.
        """
        if dtype not in self.dtypes:
            taken = ", ".join(sorted(str(d) for d in self.dtypes))
            raise UnsupportedError(f"the {self.name} kernel does not take {dtype}; use one of {taken}")
        if head_dim % self.head_multiple or (self.head_limit and head_dim > self.head_limit):
            raise UnsupportedError(
                f"the {self.name} kernel does not take a head size of {head_dim}; use a multiple of "
                f"{self.head_multiple}" + (f" up to {self.head_limit}" if self.head_limit else "")
            )


def flipped(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Reverse the rows: an anticausal triangle is a causal one with both axes flipped."""
    return tuple(t.flip(0) for t in tensors)
