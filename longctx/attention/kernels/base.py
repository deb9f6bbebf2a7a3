"""The one signature of all kernels.

A kernel works on one dense block: N queries over M keys of the same document, never empty. Legend: N query rows,
M key rows, H query heads, K kv heads, E head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from longctx.errors import UnsupportedError
from longctx.sequence.plan import Mask

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Scoring(NamedTuple):
    """From dot products to scores: ``scale * q.k``, then ``softcap * tanh(score / softcap)`` where a cap is given."""

    scale: float
    softcap: float | None = None


class Forward(Protocol):
    """Returns out_NHE in the query's dtype and lse_NH in fp32 (fp64 for fp64); rows without a key: 0 and -inf."""

    def __call__(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Backward(Protocol):
    """Returns dq_NHE, dk_MKE, dv_MKE of this block; ``out`` and ``lse`` are those of the whole row, over all blocks."""

    def __call__(
        self, dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients: ...  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A backend: its name, the dtypes and head sizes it takes, and its two functions.

    ``tile``: most rows and columns of one call, for a kernel whose memory grows with their product.
    ``softcaps``: whether it honours :attr:`Scoring.softcap`.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    forward: Forward
    backward: Backward
    head_multiple: int = 1
    head_limit: int | None = None
    tile: int | None = None
    softcaps: bool = False

    def check(self, dtype: torch.dtype, head_dim: int, softcap: float | None = None) -> None:
        """Refuse what this kernel does not take.

        Raises:
            UnsupportedError: the dtype, the head size or a soft cap.
        """
        if softcap is not None and not self.softcaps:
            raise UnsupportedError(f"the {self.name} kernel does not take softcap = {softcap}; use the naive kernel")
        if dtype not in self.dtypes:
            taken = ", ".join(sorted(str(d) for d in self.dtypes))
            raise UnsupportedError(f"the {self.name} kernel does not take {dtype}; use one of {taken}")
        if head_dim % self.head_multiple or (self.head_limit and head_dim > self.head_limit):
            raise UnsupportedError(
                f"the {self.name} kernel does not take a head size of {head_dim}; use a multiple of "
                f"{self.head_multiple}" + (f" up to {self.head_limit}" if self.head_limit else "")
            )


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FlashForward(Protocol):
    """torch's layout: [1, heads, rows, E] in, the output so and its log-sum-exp [1, H, N] out."""

    def __call__(self, qkv: Operands, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]: ...


class FlashBackward(Protocol):
    """Gradients of q, k, v [1, heads, rows, E]."""

    def __call__(
        self, dout: torch.Tensor, qkv: Operands, out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float
    ) -> Gradients: ...


def flash_kernel(
    name: str, dtypes: frozenset[torch.dtype], flash_forward: FlashForward, flash_backward: FlashBackward,
    head_multiple: int = 1, head_limit: int | None = None,
) -> Kernel:  # fmt: skip
    """A kernel around two of torch's flash operators, which know no anticausal mask: both axes are flipped for it."""

    def forward(
        q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if mask == "anticausal":
            out, lse = forward(q_NHE.flip(0), k_MKE.flip(0), v_MKE.flip(0), "causal", scoring)
            return out.flip(0), lse.flip(0)
        q, k, v = (_batched(t) for t in (q_NHE, k_MKE, v_MKE))
        out, lse = flash_forward((q, k, v), mask == "causal", scoring.scale)
        return out[0].transpose(0, 1), lse[0].T

    def backward(
        dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients:  # fmt: skip
        if mask == "anticausal":
            dout, q, k, v, out, lse = (t.flip(0) for t in (dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE, lse_NH))
            dq, dk, dv = backward(dout, q, k, v, out, lse, "causal", scoring)
            return dq.flip(0), dk.flip(0), dv.flip(0)
        dout, q, k, v, out = (_batched(t) for t in (dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE))
        lse = lse_NH.T[None].contiguous()
        dq, dk, dv = flash_backward(dout, (q, k, v), out, lse, mask == "causal", scoring.scale)
        return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)

    return Kernel(name, dtypes, forward, backward, head_multiple, head_limit)


def _batched(t_NHE: torch.Tensor) -> torch.Tensor:
    """[N, H, E] as [1, H, N, E], without a copy."""
    return t_NHE.transpose(0, 1)[None]
