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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.attention.kernels import Scoring, choose_kernel
from longctx.attention.local import Partial
from longctx.attention.merge import add_sink_, merge_
from longctx.attention.tree import tree_merge
from longctx.cache.ragged import RaggedKV
from longctx.cache.search import searched
from longctx.errors import UnsupportedError
from longctx.sequence.context import SequenceContext
from longctx.sequence.slices import Slice, Slices, band

_SCORES = 1 << 24
"""Scores of one pass, at most."""
_FEW = 64
"""Queries per lane up to which blocks are worked on all at once."""


def cached_attention(
    q_BTHE: Tensor, cache: RaggedKV, context: SequenceContext, *, window: int | None = None,
    sink_H: Tensor | None = None, scale: float | None = None, softcap: float | None = None,
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
    out_BTHE, lse_BTH = attend(q_BTHE, cache, context.positions(q_BTHE.device), scoring, window)
    if sink_H is not None:
        out_BTHE, lse_BTH = out_BTHE.contiguous(), lse_BTH.contiguous()  # of which flattening is a view
        add_sink_(out_BTHE.flatten(0, 1), lse_BTH.flatten(0, 1), sink_H)
    return out_BTHE.to(q_BTHE.dtype)


@torch.no_grad()
def attend(
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over what a cache holds on all ranks at positions up to each query's own, and its log-sum-exp.

    Args:
        position_BT: of the queries.
        window: positions that a query sees, its own included; None: all.

    Returns:
        out_BTHE and lse_BTH in fp32 (fp64 for fp64); 0 and -inf where a query sees nothing.
    """
    tokens, group = q_BTHE.shape[1], q_BTHE.shape[2] // cache.kv_heads
    neighbours = tokens * group > _FEW and bool((position_BT.diff(dim=1) == 1).all())
    work, options = _lane_by_lane if neighbours else _block_by_block, cache.options
    if options.search is not None:
        q_BTHE = options.search.queries(q_BTHE, cache.kv_heads)
        work = _by_search if tokens <= options.search.few else work
    out_BTHE, lse_BTH = work(q_BTHE, cache, position_BT, scoring, window)
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
        k_ME, v_ME, position_M = cache.lane(lane)
        slices = visible_slices(position_M.cpu().numpy(), int(position_BT[row, 0]), tokens, window)
        q_TGE = q_BTHE[row, :, head * group : (head + 1) * group]
        partial = Partial.empty(q_TGE)
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
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """All blocks at once, in parts of at most :data:`_SCORES` scores."""
    q_RQE, at_RQ = _of_lanes(q_BTHE, position_BT, cache.kv_heads)
    wide = torch.promote_types(q_BTHE.dtype, torch.float32)
    step = max(1, _SCORES // max(1, cache.pool.block * q_RQE.shape[1]))
    out_RQE = q_RQE.new_zeros(q_RQE.shape, dtype=wide)
    lse_RQ = out_RQE.new_full(q_RQE.shape[:2], float("-inf"))
    for part in _parts(_visible(cache, at_RQ, window), cache.layout.capacity, step):
        merge_(out_RQE, lse_RQ, *_partial(q_RQE, at_RQ, cache, part, scoring, window))
    return _of_rows(out_RQE, lse_RQ, q_BTHE.shape[1], cache.kv_heads)


def _by_search(
    q_BTHE: Tensor, cache: RaggedKV, position_BT: Tensor, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """The tokens that a search looks at."""
    q_RQE, at_RQ = _of_lanes(q_BTHE, position_BT, cache.kv_heads)
    return _of_rows(*searched(q_RQE, at_RQ, cache, scoring, window), q_BTHE.shape[1], cache.kv_heads)


def _of_lanes(q_BTHE: Tensor, position_BT: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Queries [R, Q, E] of every lane and their positions [R, Q]."""
    batch, tokens, heads, size = q_BTHE.shape
    q_BKGTE = q_BTHE.view(batch, tokens, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    at_RQ = position_BT.repeat_interleave(kv_heads, dim=0).repeat(1, heads // kv_heads)
    return q_BKGTE.reshape(batch * kv_heads, -1, size), at_RQ


def _of_rows(out_RQE: Tensor, lse_RQ: Tensor, tokens: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Back again: out [B, T, H, E] and log-sum-exp [B, T, H]."""
    lanes, queries, size = out_RQE.shape
    shape = (lanes // kv_heads, kv_heads, queries // tokens, tokens)
    out_BKGTE, lse_BKGT = out_RQE.view(*shape, size), lse_RQ.view(shape)
    return out_BKGTE.permute(0, 3, 1, 2, 4).flatten(2, 3), lse_BKGT.permute(0, 3, 1, 2).flatten(2)


def _visible(cache: RaggedKV, at_RQ: Tensor, window: int | None) -> Tensor:
    """Ids of the blocks that hold anything a query may see."""
    layout, counts_N = cache.layout, cache.layout.counts()
    if window is None or not len(counts_N):
        ids_n: Tensor = layout.once("filled", lambda: (counts_N > 0).nonzero()[:, 0])
        return ids_n
    position_NC = cache.pool.position_NC[: layout.capacity]
    last_N = position_NC.gather(1, (counts_N - 1).clamp_min(0)[:, None].to(position_NC.device))[:, 0].cpu()
    first_R = at_RQ.min(1).values.cpu() - window + 1
    return ((counts_N > 0) & (last_N >= first_R[layout.owner_N.clamp_min(0)])).nonzero()[:, 0]


Part = slice | Tensor
"""Some blocks: neighbours, which are read where they lie, or ids, whose blocks are copied."""


def _parts(ids_n: Tensor, blocks: int, step: int) -> Sequence[Part]:
    """The blocks in parts of ``step``; where few blocks are not wanted, these are read, too, and hidden."""
    if 4 * len(ids_n) < 3 * blocks:
        return torch.split(ids_n, step)
    return [slice(start, min(start + step, blocks)) for start in range(0, blocks, step)]


def _of(tensor: Tensor, part: Part) -> Tensor:
    return tensor[part] if isinstance(part, slice) else tensor[part.to(tensor.device)]


def _partial(
    q_RQE: Tensor, at_RQ: Tensor, cache: RaggedKV, part: Part, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """Out [R, Q, E] and log-sum-exp [R, Q] over some blocks."""
    pool, device, wide = cache.pool, q_RQE.device, torch.promote_types(q_RQE.dtype, torch.float32)
    layout = cache.layout
    owner_n = _of(layout.once(("owner", device), lambda: layout.owner_N.clamp_min(0).to(device)), part)
    counts_n = _of(layout.once(("counts", device), lambda: layout.counts().to(device)), part)
    k_nCE, v_nCE = (pool.codec.decode(tuple(_of(t, part) for t in kv)).to(device) for kv in (pool.k, pool.v))
    score_nQC = torch.bmm((q_RQE * scoring.scale)[owner_n], k_nCE.mT).to(wide)
    if scoring.softcap is not None:
        score_nQC = (score_nQC / scoring.softcap).tanh_().mul_(scoring.softcap)
    _hide(score_nQC, at_RQ, owner_n, _of(pool.position_NC, part).to(device), counts_n, window)
    top_RQ = score_nQC.new_full(q_RQE.shape[:2], torch.finfo(wide).min / 2)
    top_RQ.scatter_reduce_(0, owner_n[:, None].expand(-1, q_RQE.shape[1]), score_nQC.amax(2), "amax")
    weight_nQC = score_nQC.sub_(top_RQ[owner_n][..., None]).exp_()
    total_RQ = torch.zeros_like(top_RQ).index_add_(0, owner_n, weight_nQC.sum(2))
    sum_nQE = torch.bmm(weight_nQC.to(v_nCE.dtype), v_nCE).to(wide)
    out_RQE = q_RQE.new_zeros(q_RQE.shape, dtype=wide).index_add_(0, owner_n, sum_nQE)
    seen_RQ = total_RQ > 0
    out_RQE /= total_RQ.where(seen_RQ, 1.0)[..., None]
    return out_RQE, (total_RQ.log() + top_RQ).where(seen_RQ, float("-inf"))


def _hide(
    score_nQC: Tensor, at_RQ: Tensor, owner_n: Tensor, position_nC: Tensor, counts_n: Tensor, window: int | None
) -> None:
    """-inf, in place, where a place holds no token or one that the query does not see; few blocks have any."""
    block = position_nC.shape[1]
    last_n = position_nC.gather(1, (counts_n - 1).clamp_min(0)[:, None])[:, 0]
    partly = (counts_n < block) | (last_n > at_RQ.min(1).values[owner_n])
    if window is not None:
        partly |= position_nC[:, 0] <= at_RQ.max(1).values[owner_n] - window
    rows = partly.nonzero()[:, 0]
    if not len(rows):
        return
    key_r1C, at_rQ1 = position_nC[rows][:, None], at_RQ[owner_n[rows]][..., None]
    hidden_rQC = key_r1C > at_rQ1
    if window is not None:
        hidden_rQC |= key_r1C <= at_rQ1 - window
    hidden_rQC |= (torch.arange(block, device=at_RQ.device) >= counts_n[rows][:, None])[:, None]
    score_nQC[rows] = score_nQC[rows].masked_fill_(hidden_rQC, float("-inf"))
