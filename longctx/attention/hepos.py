"""Hepos: cross-attention in which every head sees every s-th token of a long source only.

Huang et al., arXiv 2104.02112: head h attends to source positions ``j = h (mod s)``, so that s heads in a
row see all of the source together, and keys and values of the source take 1/s of the memory, which is what an
encoder-decoder keeps through all of its decoding. With grouped heads the phase is that of the kv head, which all its
query heads share; kv heads must be a multiple of s, and then query heads are, too. Nothing is padded, where the paper's
code pads every source and lets padding be attended to.

The source may lie on the ranks in any layout. The phase of a token is that of its position in the whole source, so a
rank's lanes may be of unequal length or empty. Queries lie on the ranks in a layout of their own and keys travel
(:func:`hepos_attention`), or every rank has the same few queries, which decode (:func:`hepos_tree`).

Legend: B batch, T local target tokens, U local source tokens, M of these in a lane, s stride, H query heads, K kv
heads, G = H / K, A = H / s, E head dim. Lane r: kv heads r, r + s, ... and source tokens at positions r, r + s, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from longctx.attention.kernels import Kernel, Scoring, choose_kernel
from longctx.attention.local import Partial
from longctx.attention.schemes import Request, ring_over, schedules_of
from longctx.attention.traffic import Call, planned_ring
from longctx.attention.tree import tree_merge
from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger, Transfer
from longctx.sequence.context import SequenceContext
from longctx.sequence.kept import run_once
from longctx.sequence.layout import Layout, Run
from longctx.sequence.plan import AttentionPlan
from longctx.sequence.slices import Slice


@dataclass(frozen=True)
class StridedKV:
    """What cross-attention keeps of a source; a value, made once and read by every step of decoding.

    Args:
        keys, values: [B, M, K / s, E] of each lane, of this rank's tokens in their order.
        layout: where the source lies.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    layout: Layout

    @classmethod
    def of(cls, k_BUKE: Tensor, v_BUKE: Tensor, source: SequenceContext, stride: int) -> "StridedKV":
        """Of the keys and values of all kv heads take those that each one sees; differentiable.

        Args:
            source: of this rank's source tokens; one document per row.
            stride: s; 1 is full cross-attention.

        Raises:
            UnsupportedError: kv heads are no multiple of the stride, or the source is packed or continues another.
            ValueError: shapes that do not fit the context.
        """
        kv_heads = k_BUKE.shape[2]
        if stride < 1 or kv_heads % stride:
            raise UnsupportedError(f"stride {stride} with {kv_heads} kv heads: use a stride that divides the kv heads")
        _check_plain(source, "source")
        if source.past:
            raise UnsupportedError(f"{source.past} source tokens are past; give the whole source at once")
        wanted = (source.batch, source.local_length)
        if k_BUKE.shape[:2] != wanted or v_BUKE.shape != k_BUKE.shape:
            raise ValueError(
                f"keys {tuple(k_BUKE.shape)} and values {tuple(v_BUKE.shape)} do not fit a source of {wanted[0]} x "
                f"{wanted[1]} local tokens"
            )
        rows = [torch.from_numpy(lane).to(k_BUKE.device) for lane in phases(source, stride)]
        keys, values = (tuple(t[:, lane, number::stride] for number, lane in enumerate(rows)) for t in (k_BUKE, v_BUKE))
        return cls(keys, values, source.layout)

    @property
    def stride(self) -> int:
        """s."""
        return len(self.keys)

    @property
    def kv_heads(self) -> int:
        """K, of all lanes."""
        return self.stride * self.keys[0].shape[2]

    @property
    def numbers(self) -> int:
        """Numbers that this rank keeps."""
        return sum(t.numel() for t in (*self.keys, *self.values))


def hepos_attention(
    q_BTHE: Tensor, kv: StridedKV, target: SequenceContext, *, scale: float | None = None, kernel: Kernel | None = None
) -> Tensor:
    """Attention of this rank's target tokens, each head over its phase of the source; no mask between the two.

    Each lane's keys travel around the ranks in a ring: together 1/s of what full cross-attention sends.

    Args:
        q_BTHE: this rank's queries.
        target: of these; its group holds the source, too.
        scale: factor of the scores; default E ** -0.5.
        kernel: default: chosen from device and dtype.

    Returns:
        out_BTHE in the dtype of q. Accumulates in fp32 (fp64 for fp64).

    Raises:
        UnsupportedError: a scheme other than ring (or auto), a packed target, head counts, sizes or dtypes that do not
            fit or that no kernel takes.
        ValueError: shapes that do not fit the contexts.

    >>> target, source = SequenceContext.single(1, 3), SequenceContext.single(1, 10)
    >>> q, k, v = torch.randn(1, 3, 8, 16), torch.randn(1, 10, 4, 16), torch.randn(1, 10, 4, 16)
    >>> kv = StridedKV.of(k, v, source, stride=4)
    >>> [keys.shape[1] for keys in kv.keys]
    [3, 3, 2, 2]
    >>> hepos_attention(q, kv, target).shape
    torch.Size([1, 3, 8, 16])
    """
    _check_queries(q_BTHE, kv, target)
    kernel = kernel or choose_kernel(q_BTHE.device, q_BTHE.dtype, None)
    kernel.check(q_BTHE.dtype, q_BTHE.shape[3], None)
    request = Request(target, False, None, kernel, Scoring(q_BTHE.shape[3] ** -0.5 if scale is None else scale))
    plans = _plans(target, kv.layout, kv.stride)

    def attend(q_BTHE: Tensor, *lanes: Tensor) -> tuple[Tensor]:
        outputs = []
        for q, k, v, plan in zip(by_lane(q_BTHE, kv), lanes[::2], lanes[1::2], plans, strict=True):
            outputs.append(ring_over((q, k, v, None, None), request, plan, target.group, None)[0])
        return (_by_head(outputs, kv),)

    lanes = [t for pair in zip(kv.keys, kv.values, strict=True) for t in pair]
    return run_once(attend, (q_BTHE, *lanes), target.kept)[0]


@torch.no_grad()
def hepos_tree(
    q_BTHE: Tensor, kv: StridedKV, group: Group, ledger: Ledger | None = None, *, scale: float | None = None
) -> Tensor:
    """The same for few queries that are the same on every rank, as when decoding; with the same bits everywhere.

    Each rank attends to its own part of the source, and one maximum and one sum join all heads (see
    :func:`longctx.attention.tree.tree_merge`): messages that do not grow with the source.

    Raises:
        UnsupportedError: head counts, sizes or dtypes that do not fit or that no kernel takes.
        ValueError: the source lies on another number of ranks.
    """
    _check_heads(q_BTHE, kv, group)
    kernel = choose_kernel(q_BTHE.device, q_BTHE.dtype, None)
    kernel.check(q_BTHE.dtype, q_BTHE.shape[3], None)
    scoring = Scoring(q_BTHE.shape[3] ** -0.5 if scale is None else scale)
    batch, tokens = q_BTHE.shape[:2]
    outputs, sums = [], []
    for q_BTAE, k_BMKE, v_BMKE in zip(by_lane(q_BTHE, kv), kv.keys, kv.values, strict=True):
        keys = k_BMKE.shape[1]
        rows = [Slice(b * tokens, (b + 1) * tokens, b * keys, (b + 1) * keys, "full") for b in range(batch) if keys]
        q_NAE, k_MKE, v_MKE = (t.flatten(0, 1) for t in (q_BTAE, k_BMKE, v_BMKE))
        partial = Partial.empty(q_NAE)
        partial.attend(q_NAE, k_MKE, v_MKE, rows, kernel, scoring)
        out_NAE, lse_NA = partial.finished(None, partial.out_NHE.dtype)
        outputs.append(out_NAE.view(q_BTAE.shape))
        sums.append(lse_NA.view(*q_BTAE.shape[:3], 1))
    out_BTHE, _ = tree_merge(_by_head(outputs, kv), _by_head(sums, kv)[..., 0], group, ledger)
    return out_BTHE.to(q_BTHE.dtype)


def planned_hepos(target: SequenceContext, source: Layout, stride: int, call: Call) -> list[Transfer]:
    """What a forward and a backward of :func:`hepos_attention` post on this rank, in order.

    Args:
        source: its layout.
        call: heads of all lanes.
    """
    if target.degree == 1:
        return []
    own = Call(call.heads // stride, call.kv_heads // stride, call.head_dim, call.dtype, causal=False)
    passes = [
        planned_ring(schedules_of(target, plan, None), target.group, own) for plan in _plans(target, source, stride)
    ]
    # The backward takes the lanes in the opposite order.
    return [t for there, _ in passes for t in there] + [t for _, back in reversed(passes) for t in back]


def phases(source: SequenceContext, stride: int) -> list[np.ndarray]:
    """For every lane which of this rank's tokens are in it."""
    phase_U = source.layout.indices(source.rank) % stride
    return [np.flatnonzero(phase_U == lane) for lane in range(stride)]


def by_lane(q_BTHE: Tensor, kv: StridedKV) -> list[Tensor]:
    """The queries [B, T, H / s, E] of every lane."""
    batch, tokens, heads, size = q_BTHE.shape
    q_BTKGE = q_BTHE.reshape(batch, tokens, kv.kv_heads, heads // kv.kv_heads, size)
    return [q_BTKGE[:, :, lane :: kv.stride].flatten(2, 3) for lane in range(kv.stride)]


def _by_head(lanes: Sequence[Tensor], kv: StridedKV) -> Tensor:
    """The inverse of :func:`by_lane`."""
    batch, tokens, heads, size = lanes[0].shape
    own = kv.kv_heads // kv.stride
    by_kv_head = [t.reshape(batch, tokens, own, heads // own, size) for t in lanes]
    return torch.stack(by_kv_head, dim=3).flatten(2, 4)


def _plans(target: SequenceContext, source: Layout, stride: int) -> list[AttentionPlan]:
    """One per lane. Nothing is masked, so only how many tokens a rank has matters."""

    def make() -> list[AttentionPlan]:
        counts = [np.bincount(source.indices(rank) % stride, minlength=stride) for rank in range(source.degree)]
        queries = _stacked(target.layout.sizes)
        return [
            AttentionPlan(queries, _stacked([int(c[lane]) for c in counts]), target.documents, causal=False)
            for lane in range(stride)
        ]

    plans: list[AttentionPlan] = target.once(("hepos", source, stride), make)
    return plans


def _stacked(sizes: Sequence[int]) -> Layout:
    """So many tokens on every rank, one rank after the other."""
    bounds = list(pairwise(accumulate(sizes, initial=0)))
    return Layout(sum(sizes), tuple((Run(a, b),) if a < b else () for a, b in bounds))


def _check_queries(q_BTHE: Tensor, kv: StridedKV, target: SequenceContext) -> None:
    _check_plain(target, "target")
    _check_heads(q_BTHE, kv, target.group)
    if target.degree > 1 and target.scheme not in ("ring", "auto"):
        raise UnsupportedError(f"scheme {target.scheme}: the keys of Hepos travel in a ring; use target.under('ring')")
    if q_BTHE.shape[:2] != (target.batch, target.local_length):
        raise ValueError(
            f"queries {tuple(q_BTHE.shape)} do not fit a target of {target.batch} x {target.local_length} local tokens"
        )


def _check_heads(q_BTHE: Tensor, kv: StridedKV, group: Group) -> None:
    key = kv.keys[0]
    if q_BTHE.shape[2] % kv.kv_heads or q_BTHE.shape[3] != key.shape[3] or q_BTHE.dtype != key.dtype:
        raise UnsupportedError(
            f"queries {tuple(q_BTHE.shape)} of {q_BTHE.dtype} over {kv.kv_heads} kv heads of {key.shape[3]} numbers of "
            f"{key.dtype}: use a multiple of the kv heads, one head size and one dtype"
        )
    if key.shape[0] != q_BTHE.shape[0] or kv.layout.degree != group.size:
        raise ValueError(
            f"a source of {key.shape[0]} rows on {kv.layout.degree} ranks for queries of {q_BTHE.shape[0]} rows on "
            f"{group.size}"
        )


def _check_plain(context: SequenceContext, name: str) -> None:
    if any(len(starts) > 1 for starts in context.documents):
        raise UnsupportedError(f"the {name} is packed; give Hepos one document per row")
