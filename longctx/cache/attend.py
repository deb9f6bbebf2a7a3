"""Attention over a ragged cache, without ever making it dense.

Few queries: all blocks of all lanes at once (:mod:`longctx.cache.blocks`). Many queries, a chunk of a prompt: lane by
lane with the kernels that training uses.

Legend: B batch, T new tokens, K kv heads, G query heads per kv head, H = K x G, R = B x K lanes, Q = G x T queries of a
lane, E head dim.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.attention.bias import add_bias_, by_query_head
from longctx.attention.kernels import Scoring, choose_kernel
from longctx.attention.local import Partial
from longctx.attention.merge import add_sink_, merge_
from longctx.attention.tree import tree_merge
from longctx.cache.blocks import even_lanes, over_blocks, over_even, parts, visible_blocks, weighted_even
from longctx.cache.ragged import RaggedKV
from longctx.cache.search import searched
from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext
from longctx.sequence.slices import Slice, Slices, band

_SCORES = 1 << 24
"""Scores of one pass, at most."""
_FEW = 64
"""Queries per lane up to which blocks are worked on all at once."""


@torch.no_grad()
def cached_attention(
    q_BTHE: Tensor, cache: RaggedKV, context: SequenceContext, *, window: int | None = None,
    sink_H: Tensor | None = None, scale: float | None = None, softcap: float | None = None,
    bias_2KE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """:func:`longctx.attention.attention` of new tokens over a cache that holds them, too; in the dtype of q.

    Raises:
        UnsupportedError: the sequence is sharded or packed.
        ValueError: the cache has not seen as many tokens as the context has.
    """
    if context.degree > 1 or any(len(starts) > 1 for starts in context.documents):
        raise UnsupportedError("a cache holds one unsharded document per row; use degree 1, no packing")
    if cache.seen != context.length:
        raise ValueError(f"the cache has seen {cache.seen} tokens, the context has {context.length}")
    scoring = Scoring(q_BTHE.shape[3] ** -0.5 if scale is None else scale, softcap)
    tokens, newest = q_BTHE.shape[1], q_BTHE.shape[1] == 1  # the context ends with the queries
    whole = window is None and cache.options.owns_all and cache.options.search is None
    if whole and sink_H is None and bias_2KE is None and tokens * q_BTHE.shape[2] <= _FEW * cache.kv_heads:
        even = even_lanes(cache.pool, cache.layout, _most_blocks(q_BTHE, cache))
        if even is not None:  # so it is in most steps: no more than needed is done
            out_RQE, _, _ = weighted_even(_of_lanes(q_BTHE, cache.kv_heads), even, scoring, tokens)
            return _of_rows(out_RQE, tokens, cache.kv_heads).to(q_BTHE.dtype)
    out_BTHE, lse_BTH = attend(q_BTHE, cache, context.positions(q_BTHE.device), scoring, window, newest)
    if sink_H is None and bias_2KE is None:
        return out_BTHE.to(q_BTHE.dtype)
    out_NHE, lse_NH = out_BTHE.flatten(0, 1), lse_BTH.flatten(0, 1)
    # What is learned is no rank's own: it joins once, after the merge over ranks.
    if sink_H is not None:
        add_sink_(out_NHE, lse_NH, sink_H)
    bias_2HE = by_query_head(bias_2KE, q_BTHE.shape[2])
    if bias_2HE is not None:
        add_bias_(out_NHE, lse_NH, q_BTHE.flatten(0, 1), bias_2HE, scoring)
    return out_NHE.view(q_BTHE.shape).to(q_BTHE.dtype)


@torch.no_grad()
def attend(
    q_BTHE: Tensor,
    cache: RaggedKV,
    position_BT: Tensor,
    scoring: Scoring,
    window: int | None = None,
    newest: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over what a cache holds on all ranks at positions up to each query's own, and its log-sum-exp.

    Args:
        position_BT: of the queries.
        window: positions that a query sees, its own included; None: all.
        newest: no token of a row is behind its queries, which need not be asked then.

    Returns:
        out_BTHE and lse_BTH in fp32 (fp64 for fp64); 0 and -inf where a query sees nothing.
    """
    tokens, group = q_BTHE.shape[1], q_BTHE.shape[2] // cache.kv_heads
    neighbours = tokens * group > _FEW and bool((position_BT.diff(dim=1) == 1).all())
    options = cache.options
    if options.search is not None:
        q_BTHE = options.search.queries(q_BTHE, cache.kv_heads)
    if options.search is not None and tokens <= options.search.few:
        out_BTHE, lse_BTH = _by_search(q_BTHE, cache, position_BT, scoring, window)
    elif neighbours:
        out_BTHE, lse_BTH = _lane_by_lane(q_BTHE, cache, position_BT, scoring, window)
    else:
        out_BTHE, lse_BTH = _block_by_block(q_BTHE, cache, position_BT, scoring, window, newest)
    return (
        (out_BTHE, lse_BTH) if options.ranks is None else tree_merge(out_BTHE, lse_BTH, options.ranks, options.ledger)
    )


def _lane_by_lane(
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """With the kernels of training, which are told of runs of neighbouring positions; those of a row have no gap."""
    batch, tokens, heads, size = q_BTHE.shape
    group, kernel = heads // cache.kv_heads, choose_kernel(q_BTHE.device, q_BTHE.dtype, scoring.softcap)
    kernel.check(q_BTHE.dtype, size, scoring.softcap)
    wide = torch.promote_types(q_BTHE.dtype, torch.float32)
    parts = []
    for lane in range(batch * cache.kv_heads):
        row, head = divmod(lane, cache.kv_heads)
        q_TGE = q_BTHE[row, :, head * group : (head + 1) * group]
        partial = Partial.empty(q_TGE)
        for k_ME, v_ME, position_M in cache.lane_in_parts(lane):
            slices = visible_slices(position_M.cpu().numpy(), int(position_BT[row, 0]), tokens, window)
            k_M1E, v_M1E = (t.to(q_BTHE.device)[:, None] for t in (k_ME, v_ME))
            partial.attend(q_TGE, k_M1E, v_M1E, slices, kernel, scoring)
        parts.append(partial.finished(None, wide))
    by_row = [parts[row * cache.kv_heads : (row + 1) * cache.kv_heads] for row in range(batch)]
    out_BTHE = torch.stack([torch.cat([out for out, _ in row], dim=1) for row in by_row])
    return out_BTHE, torch.stack([torch.cat([lse for _, lse in row], dim=1) for row in by_row])


def visible_slices(position_M: npt.NDArray[np.int64], first: int, queries: int, window: int | None) -> Slices:
    """Which keys, by place, queries at ``first`` and the positions after it see; each pair in exactly one slice.

    Args:
        position_M: of the keys, ascending, with gaps.
    """
    last = first + queries - 1
    oldest = 0 if window is None else first - window + 1  # older keys are seen by none
    for_all = 0 if window is None else last - window + 1  # older keys are not seen by all
    bounds = [int(np.searchsorted(position_M, p)) for p in (oldest, max(oldest, for_all), first + 1, last + 1)]
    start, inner, outer, stop = bounds
    inner = min(inner, outer)
    found = [Slice(0, queries, inner, outer, "full")] if inner < outer else []
    for begin, end in ((start, inner), (outer, stop)):
        cuts = begin + 1 + np.flatnonzero(np.diff(position_M[begin:end]) != 1)
        edges = [begin, *cuts.tolist(), end] if begin < end else []
        for a, b in pairwise(edges):
            key, hi = int(position_M[a]), None if window is None else window - 1
            for part in band(first, last + 1, key, key + b - a, 0, hi):
                moved = (part.q_start - first, part.q_end - first, part.k_start - key + a, part.k_end - key + a)
                found.append(Slice(*moved, part.mask))
    return Slices(found)


def _block_by_block(
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None, newest: bool = False
) -> tuple[Tensor, Tensor]:
    """All blocks of a storage at once, in parts of at most :data:`_SCORES` scores."""
    q_RQE, newest = _of_lanes(q_BTHE, cache.kv_heads), newest and window is None
    most = _most_blocks(q_BTHE, cache)
    even = even_lanes(cache.pool, cache.layout, most) if newest else None
    if even is not None:
        return _both_of_rows(*over_even(q_RQE, even, scoring), q_BTHE.shape[1], cache.kv_heads)
    at_RQ = None if newest else _places(q_BTHE, position_BT, cache.kv_heads)
    partials = (
        over_blocks(q_RQE, at_RQ, held, part, scoring, window)
        for held in cache.pool.held(cache.layout)
        for part in parts(visible_blocks(held, at_RQ, window), held.layout.capacity, min(most, held.store.step))
    )
    out_RQE, lse_RQ = next(partials)
    for partial in partials:
        merge_(out_RQE, lse_RQ, *partial)
    return _both_of_rows(out_RQE, lse_RQ, q_BTHE.shape[1], cache.kv_heads)


def _most_blocks(q_BTHE: Tensor, cache: RaggedKV) -> int:
    """How many are worked on at once."""
    return max(1, _SCORES * cache.kv_heads // max(1, cache.pool.block * q_BTHE.shape[1] * q_BTHE.shape[2]))


def _by_search(
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """The tokens that a search looks at."""
    q_RQE, at_RQ = _of_lanes(q_BTHE, cache.kv_heads), _places(q_BTHE, position_BT, cache.kv_heads)
    return _both_of_rows(*searched(q_RQE, at_RQ, cache, scoring, window), q_BTHE.shape[1], cache.kv_heads)


def _of_lanes(q_BTHE: Tensor, kv_heads: int) -> Tensor:
    """Queries [R, Q, E] of every lane."""
    batch, tokens, heads, size = q_BTHE.shape
    if tokens == 1:
        return q_BTHE.reshape(batch * kv_heads, -1, size)
    q_BKGTE = q_BTHE.view(batch, tokens, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return q_BKGTE.reshape(batch * kv_heads, -1, size)


def _places(q_BTHE: Tensor, position_BT: Tensor, kv_heads: int) -> Tensor:
    """Positions [R, Q] of the queries of every lane."""
    return position_BT.repeat_interleave(kv_heads, dim=0).repeat(1, q_BTHE.shape[2] // kv_heads)


def _of_rows(out_RQE: Tensor, tokens: int, kv_heads: int) -> Tensor:
    """Back again: out [B, T, H, E]."""
    lanes, queries, size = out_RQE.shape
    if tokens == 1:
        return out_RQE.reshape(lanes // kv_heads, 1, -1, size)
    out_BKGTE = out_RQE.view(lanes // kv_heads, kv_heads, queries // tokens, tokens, size)
    return out_BKGTE.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _both_of_rows(out_RQE: Tensor, lse_RQ: Tensor, tokens: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """The same with the log-sum-exp [B, T, H]."""
    return _of_rows(out_RQE, tokens, kv_heads), _of_rows(lse_RQ[..., None], tokens, kv_heads)[..., 0]
