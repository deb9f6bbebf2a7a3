"""The one signature of all kernels.

A kernel works on one dense block: N queries over M keys of the same document, never empty, square where it is masked
(but see :attr:`Kernel.strip`). One that takes sequences of different lengths works on many such blocks in one call.

Legend: N query rows, M key rows, H query heads, K kv heads, E head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
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
    """Returns out_NHE in the query's dtype or wider and lse_NH in fp32 (fp64 for fp64)."""

    def __call__(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Backward(Protocol):
    """Returns dq_NHE, dk_MKE, dv_MKE of this block, in the operands' dtype or wider.

    ``out`` and ``lse`` are those of the whole row, over all blocks.
    """

    def __call__(
        self, dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients: ...  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """Blocks of one mask, their rows and keys laid one after another.

    Block i has rows ``[q_bounds[i], q_bounds[i + 1])`` and keys ``[k_bounds[i], k_bounds[i + 1])``; causal ones are
    square.
    """

    q_bounds: tuple[int, ...]
    k_bounds: tuple[int, ...]
    causal: bool
    _tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def longest(self) -> tuple[int, int]:
        """Most rows and most keys of any block."""
        rows, columns = (max(b - a for a, b in pairwise(bounds)) for bounds in (self.q_bounds, self.k_bounds))
        return rows, columns

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Both bounds as int32 tensors, brought to the device once."""
        if device not in self._tables:
            q, k = (torch.tensor(bounds, dtype=torch.int32).to(device) for bounds in (self.q_bounds, self.k_bounds))
            self._tables[device] = q, k
        return self._tables[device]


class VarlenForward(Protocol):
    """:class:`Forward` of all blocks in one call; no row is in two blocks."""

    def __call__(
        self, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, segments: Segments, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class VarlenBackward(Protocol):
    """:class:`Backward` of all blocks in one call."""

    def __call__(
        self, dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, segments: Segments, scoring: Scoring,
    ) -> Gradients: ...  # fmt: skip


def flipping(forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
    """Functions that know full and causal blocks, taught the anticausal one: a causal one with both axes flipped."""

    def flipped_forward(
        q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor, mask: Mask, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if mask != "anticausal":
            return forward(q_NHE, k_MKE, v_MKE, mask, scoring)
        out, lse = forward(q_NHE.flip(-3), k_MKE.flip(-3), v_MKE.flip(-3), "causal", scoring)
        return out.flip(-3), lse.flip(-2)

    def flipped_backward(
        dout_NHE: torch.Tensor, q_NHE: torch.Tensor, k_MKE: torch.Tensor, v_MKE: torch.Tensor,
        out_NHE: torch.Tensor, lse_NH: torch.Tensor, mask: Mask, scoring: Scoring,
    ) -> Gradients:  # fmt: skip
        if mask != "anticausal":
            return backward(dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE, lse_NH, mask, scoring)
        dout, q, k, v, out = (t.flip(-3) for t in (dout_NHE, q_NHE, k_MKE, v_MKE, out_NHE))
        dq, dk, dv = backward(dout, q, k, v, out, lse_NH.flip(-2), "causal", scoring)
        return dq.flip(-3), dk.flip(-3), dv.flip(-3)

    return flipped_forward, flipped_backward


class Varlen(NamedTuple):
    """The two functions of a kernel that takes many blocks in one call."""

    forward: VarlenForward
    backward: VarlenBackward


def always(device: torch.device) -> bool:
    """A kernel that needs nothing but its device."""
    return True


@dataclass(frozen=True)
class Kernel:
    """A backend: its name, the dtypes and head sizes it takes, and its two functions.

    ``tile``: most rows and most keys of a block: what a call holds beside its operands grows with them.
    ``backward_tile``: the same of a backward; that of the forward unless given.
    ``softcaps``: whether it honours :attr:`Scoring.softcap`.
    ``strip``: for a kernel that computes much of what a triangle hides: rows of a strip and of a block of strips (see
    :mod:`longctx.attention.cutting`). Such a kernel takes causal blocks of more keys than rows, whose last row sees
    all keys, and equal blocks with a batch dimension before all others. None: the kernel skips what is hidden.
    ``varlen``: the functions for many blocks in one call, where it has them.
    ``found``: whether it can run on a device of this process.
    """

    name: str
    dtypes: frozenset[torch.dtype]
    forward: Forward
    backward: Backward
    head_multiple: int = 1
    head_limit: int | None = None
    tile: tuple[int, int] | None = None
    backward_tile: tuple[int, int] | None = None
    softcaps: bool = False
    strip: tuple[int, int] | None = None
    varlen: Varlen | None = None
    found: Callable[[torch.device], bool] = always

    def __post_init__(self) -> None:
        """Strips are not cut again.

        Raises:
            ValueError: strips that do not fill their blocks or do not fit the tiles, or beside ``varlen``.
        """
        if self.strip is None:
            return
        if self.varlen is not None:
            raise ValueError(f"the {self.name} kernel takes blocks of many lengths; leave out its strips")
        least = min((side for tile in (self.tile, self.backward_tile) if tile for side in tile), default=self.strip[1])
        if self.strip[1] % self.strip[0] or self.strip[1] > least:
            raise ValueError(
                f"strips {self.strip} of the {self.name} kernel; use a block of whole strips that fits its tiles"
            )

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
