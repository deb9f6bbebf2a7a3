"""Attention over a ragged cache, without ever making it dense.

Few queries: all blocks of all lanes at once: one batched product of every block with the queries of its lane, a softmax
over all blocks of a lane by scattered maxima and sums, and a second product. The cost is that of the blocks in use;
beside them it holds one score per key and query. Many queries, a chunk of a prompt: lane by lane with the kernels that
training uses.

Legend: B batch, T new tokens, K kv heads, G query heads per kv head, H = K x G, R = B x K lanes, Q = G x T queries of a
lane, N blocks, C tokens per block, E head dim.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.attention.bias import add_bias_, by_query_head
from longctx.attention.kernels import Scoring, choose_kernel
from longctx.attention.local import Partial
from longctx.attention.merge import add_sink_, merge_
from longctx.attention.tree import tree_merge
from longctx.cache.layout import BlockLayout
from longctx.cache.pool import Held, Part, taken
from longctx.cache.ragged import RaggedKV
from longctx.cache.search import searched
from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext
from longctx.sequence.slices import Slice, Slices, band

_SCORES = 1 << 24
"""Scores of one pass, at most."""
_FEW = 64
"""Queries per lane up to which blocks are worked on all at once."""
_LONG = 8
"""Blocks per group of runs from which on they are worked on by group, and of a piece of a run, at most."""


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
    newest = q_BTHE.shape[1] == 1  # the context ends with the queries
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
    q_RQE = _of_lanes(q_BTHE, cache.kv_heads)
    at_RQ = None if newest and window is None else _places(q_BTHE, position_BT, cache.kv_heads)
    step = max(1, _SCORES // max(1, cache.pool.block * q_RQE.shape[1]))
    partials = (
        _partial(q_RQE, at_RQ, held, part, scoring, window)
        for held in cache.pool.held(cache.layout)
        for part in _parts(_visible(held, at_RQ, window), held.layout.capacity, min(step, held.store.step))
    )
    out_RQE, lse_RQ = next(partials)
    for partial in partials:
        merge_(out_RQE, lse_RQ, *partial)
    return _of_rows(out_RQE, lse_RQ, q_BTHE.shape[1], cache.kv_heads)


def _by_search(
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """The tokens that a search looks at."""
    q_RQE, at_RQ = _of_lanes(q_BTHE, cache.kv_heads), _places(q_BTHE, position_BT, cache.kv_heads)
    return _of_rows(*searched(q_RQE, at_RQ, cache, scoring, window), q_BTHE.shape[1], cache.kv_heads)


def _of_lanes(q_BTHE: Tensor, kv_heads: int) -> Tensor:
    """Queries [R, Q, E] of every lane."""
    batch, tokens, heads, size = q_BTHE.shape
    q_BKGTE = q_BTHE.view(batch, tokens, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return q_BKGTE.reshape(batch * kv_heads, -1, size)


def _places(q_BTHE: Tensor, position_BT: Tensor, kv_heads: int) -> Tensor:
    """Positions [R, Q] of the queries of every lane."""
    return position_BT.repeat_interleave(kv_heads, dim=0).repeat(1, q_BTHE.shape[2] // kv_heads)


def _of_rows(out_RQE: Tensor, lse_RQ: Tensor, tokens: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Back again: out [B, T, H, E] and log-sum-exp [B, T, H]."""
    lanes, queries, size = out_RQE.shape
    shape = (lanes // kv_heads, kv_heads, queries // tokens, tokens)
    out_BKGTE, lse_BKGT = out_RQE.view(*shape, size), lse_RQ.view(shape)
    return out_BKGTE.permute(0, 3, 1, 2, 4).flatten(2, 3), lse_BKGT.permute(0, 3, 1, 2).flatten(2)


def _visible(held: Held, at_RQ: Tensor | None, window: int | None) -> Tensor:
    """Ids of the blocks that hold anything a query may see."""
    layout, counts_N = held.layout, held.layout.counts()
    if at_RQ is None or window is None or not len(counts_N):
        ids_n: Tensor = layout.once("filled", lambda: (counts_N > 0).nonzero()[:, 0])
        return ids_n
    position_NC = held.store.position_NC[: layout.capacity]
    last_N = position_NC.gather(1, (counts_N - 1).clamp_min(0)[:, None].to(position_NC.device))[:, 0].cpu()
    first_R = at_RQ.min(1).values.cpu() - window + 1
    return ((counts_N > 0) & (last_N >= first_R[layout.owner_N.clamp_min(0)])).nonzero()[:, 0]


def _parts(ids_n: Tensor, blocks: int, step: int) -> Sequence[Part]:
    """The blocks in one or more parts of ``step``; where few are not wanted, these are read, too, and hidden."""
    if 4 * len(ids_n) < 3 * blocks:
        return torch.split(ids_n, step)
    return [slice(start, min(start + step, blocks)) for start in range(0, max(blocks, 1), step)]


def _partial(
    q_RQE: Tensor, at_RQ: Tensor | None, held: Held, part: Part, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """Out [R, Q, E] and log-sum-exp [R, Q] over some blocks; without ``at_RQ`` the queries see all of them."""
    device, wide, layout = q_RQE.device, torch.promote_types(q_RQE.dtype, torch.float32), held.layout
    owner_N = layout.once(("owner", device), lambda: layout.owner_N.clamp_min(0).to(device))
    owner_n = taken(owner_N, part, device)
    k_nCE, v_nCE = held.store.read(part, device)
    groups = _groups(layout, part, owner_n)
    score_nCQ = _scores(q_RQE * scoring.scale, k_nCE, groups).to(wide)
    if scoring.softcap is not None:
        score_nCQ = (score_nCQ / scoring.softcap).tanh_().mul_(scoring.softcap)
    _hide(score_nCQ, at_RQ, owner_n, held, part, window)
    weight_nCQ, top_RQ = _exponentials(score_nCQ, owner_n, len(q_RQE))
    total_RQ = torch.zeros_like(top_RQ).index_add_(0, owner_n, weight_nCQ.sum(1))
    out_RQE = _sums(weight_nCQ.to(v_nCE.dtype), v_nCE, groups, len(q_RQE))
    seen_RQ = total_RQ > 0
    out_RQE /= total_RQ.where(seen_RQ, 1.0)[..., None]
    return out_RQE, (total_RQ.log() + top_RQ).where(seen_RQ, float("-inf"))


class Group(NamedTuple):
    """Runs of ``length`` blocks of one lane each, from block ``start`` of a part to ``stop``; pieces divide a run.

    Args:
        lane_g: the lane of every run; piece_p: of every piece; pieces: blocks of one.
    """

    start: int
    stop: int
    length: int
    lane_g: Tensor
    pieces: int
    piece_p: Tensor


def _groups(layout: BlockLayout, part: Part, owner_n: Tensor) -> list[Group]:
    """A prompt leaves long runs: one product over a run reads its keys twice as fast as one per block.

    Blocks of no lane may be left out.
    """
    each = Group(0, len(owner_n), 1, owner_n, 1, owner_n)
    if not isinstance(part, slice):
        return [each]

    def find() -> list[Group]:
        lanes_n = layout.owner_N[part].numpy()
        edges = np.flatnonzero(np.diff(lanes_n, prepend=-2, append=-2))
        lane_r, length_r = lanes_n[edges[:-1]], np.diff(edges)
        cuts = np.flatnonzero(np.diff(np.where(lane_r < 0, -1, length_r), prepend=0, append=0))
        if len(cuts) * _LONG > len(lanes_n):
            return [each]
        found = []
        for first, behind in pairwise(cuts.tolist()):
            if lane_r[first] >= 0:
                length, lane_g = int(length_r[first]), torch.from_numpy(lane_r[first:behind]).to(owner_n.device)
                pieces = max(n for n in range(1, _LONG + 1) if length % n == 0)
                piece_p = lane_g.repeat_interleave(length // pieces)
                found.append(Group(int(edges[first]), int(edges[behind]), length, lane_g, pieces, piece_p))
        return found

    groups: list[Group] = layout.once(("groups", part.start, part.stop, owner_n.device), find)
    return groups


def _scores(q_RQE: Tensor, k_nCE: Tensor, groups: list[Group]) -> Tensor:
    """Products [n, C, Q] of every block with the queries of its lane; 0 for blocks of none."""
    blocks, places, size = k_nCE.shape
    score_nCQ = k_nCE.new_zeros(blocks, places, q_RQE.shape[1])
    for group in groups:  # keys first: few rows times many columns take twice as long
        k_gME = k_nCE[group.start : group.stop].view(-1, group.length * places, size)
        score_gMQ = score_nCQ[group.start : group.stop].view(*k_gME.shape[:2], q_RQE.shape[1])
        torch.bmm(k_gME, q_RQE[group.lane_g].mT, out=score_gMQ)
    return score_nCQ


def _exponentials(score_nCQ: Tensor, owner_n: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """In place: exp(score - top), and top [R, Q], the largest score of every query.

    Reductions and broadcasts whose innermost size is a small Q are slow, so several places go side by side.
    """
    blocks, places, queries = score_nCQ.shape
    side = gcd(places, 8)
    wide_nPs = score_nCQ.view(blocks, places // side, side * queries)
    top_nQ = wide_nPs.amax(1).view(blocks, side, queries).amax(1)
    top_RQ = score_nCQ.new_full((lanes, queries), torch.finfo(score_nCQ.dtype).min / 2)
    top_RQ.scatter_reduce_(0, owner_n[:, None].expand_as(top_nQ), top_nQ, "amax")
    wide_nPs.sub_(top_RQ[owner_n].repeat(1, side)[:, None]).exp_()
    return score_nCQ, top_RQ


def _sums(weight_nCQ: Tensor, v_nCE: Tensor, groups: list[Group], lanes: int) -> Tensor:
    """Weighted sums [R, Q, E] of the values of every lane."""
    wide = torch.promote_types(v_nCE.dtype, torch.float32)
    places, queries, size = weight_nCQ.shape[1], weight_nCQ.shape[2], v_nCE.shape[2]
    sum_RQE = v_nCE.new_zeros(lanes, queries, size, dtype=wide)
    for group in groups:  # in pieces, which threads share
        weight_pMQ = weight_nCQ[group.start : group.stop].view(-1, group.pieces * places, queries)
        v_pME = v_nCE[group.start : group.stop].view(-1, group.pieces * places, size)
        sum_RQE.index_add_(0, group.piece_p, torch.bmm(weight_pMQ.mT, v_pME).to(wide))
    return sum_RQE


def _hide(score_nCQ: Tensor, at_RQ: Tensor | None, owner_n: Tensor, held: Held, part: Part, window: int | None) -> None:
    """-inf, in place, where a place holds no token or one that the query does not see; few blocks have any."""
    layout, block, device = held.layout, score_nCQ.shape[1], score_nCQ.device
    if at_RQ is None:
        empty_p = _unused(layout, part, device)
        score_nCQ.view(-1, score_nCQ.shape[2]).index_fill_(0, empty_p, float("-inf"))
        return
    counts_n = taken(layout.once(("counts", device), lambda: layout.counts().to(device)), part, device)
    position_nC = taken(held.store.position_NC, part, device)
    last_n = position_nC.gather(1, (counts_n - 1).clamp_min(0)[:, None])[:, 0]
    partly = (counts_n < block) | (last_n > at_RQ.min(1).values[owner_n])
    if window is not None:
        partly |= position_nC[:, 0] <= at_RQ.max(1).values[owner_n] - window
    rows = partly.nonzero()[:, 0]
    if not len(rows):
        return
    key_rC1, at_r1Q = position_nC[rows][..., None], at_RQ[owner_n[rows]][:, None]
    hidden_rCQ = key_rC1 > at_r1Q
    if window is not None:
        hidden_rCQ |= key_rC1 <= at_r1Q - window
    hidden_rCQ |= (torch.arange(block, device=device) >= counts_n[rows][:, None])[..., None]
    score_nCQ[rows] = score_nCQ[rows].masked_fill_(hidden_rCQ, float("-inf"))


def _unused(layout: BlockLayout, part: Part, device: torch.device) -> Tensor:
    """Places without a token, by number among those of a part."""

    def find() -> Tensor:
        places = torch.arange(layout.block) >= layout.counts()[part][:, None]
        return places.flatten().nonzero()[:, 0].to(device)

    found: Tensor = layout.once(("unused", part.start, part.stop, device), find) if isinstance(part, slice) else find()
    return found
