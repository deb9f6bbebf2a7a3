"""Attention of a few queries per lane over blocks, without ever making the cache dense.

One batched product of the queries with the keys of their lane, a softmax over all blocks of a lane, and a second
product. Blocks lie in any order: where long runs of them are of one lane, a run is one factor; where all lanes are
even (:class:`Even`) the softmax is over neighbours in memory; else its maxima and sums are scattered. The cost is
that of the blocks in use; beside them it holds one score per key and query.

Legend: R lanes, Q queries of a lane, N blocks, n of them, C tokens per block, E head dim, M tokens of a run of blocks.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.attention.kernels import Scoring
from longctx.cache.layout import BlockLayout
from longctx.cache.pool import Held, Part, Pool, taken

_LONG = 8
"""Blocks per group of runs from which on they are worked on by group, and of a piece of a run, at most."""


def visible_blocks(held: Held, at_RQ: Tensor | None, window: int | None) -> Tensor:
    """Ids of the blocks that hold anything a query may see."""
    layout = held.layout
    if at_RQ is None or window is None or not layout.capacity:
        return layout.held
    counts_N = layout.counts()
    position_NC = held.store.position_NC[: layout.capacity]
    last_N = position_NC.gather(1, (counts_N - 1).clamp_min(0)[:, None].to(position_NC.device))[:, 0].cpu()
    first_R = at_RQ.min(1).values.cpu() - window + 1
    return ((counts_N > 0) & (last_N >= first_R[layout.owner_N.clamp_min(0)])).nonzero()[:, 0]


def parts(ids_n: Tensor, blocks: int, step: int) -> Sequence[Part]:
    """The blocks in one or more parts of ``step``; where few are not wanted, these are read, too, and hidden."""
    if 4 * len(ids_n) < 3 * blocks:
        return torch.split(ids_n, step)
    return [slice(start, min(start + step, blocks)) for start in range(0, max(blocks, 1), step)]


def over_blocks(
    q_RQE: Tensor, at_RQ: Tensor | None, held: Held, part: Part, scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """Out [R, Q, E] and log-sum-exp [R, Q] over some blocks; without ``at_RQ`` the queries see all of them."""
    device, wide, layout = q_RQE.device, torch.promote_types(q_RQE.dtype, torch.float32), held.layout
    owner_N = layout.of_blocks(("owner", device), lambda: layout.owner_N.clamp_min(0).to(device))
    owner_n = taken(owner_N, part, device)
    k_nCE, v_nCE = held.store.read(part, device)
    groups = _groups(layout, part, owner_n)
    score_nCQ = _capped(_scores(q_RQE * scoring.scale, k_nCE, groups).to(wide), scoring)
    _hide(score_nCQ, at_RQ, owner_n, held, part, window)
    weight_nCQ, top_RQ = _exponentials(score_nCQ, owner_n, len(q_RQE))
    total_RQ = torch.zeros_like(top_RQ).index_add_(0, owner_n, weight_nCQ.sum(1))
    out_RQE = _sums(weight_nCQ.to(v_nCE.dtype), v_nCE, groups, len(q_RQE))
    seen_RQ = total_RQ > 0
    out_RQE /= total_RQ.where(seen_RQ, 1.0)[..., None]
    return out_RQE, (total_RQ.log() + top_RQ).where(seen_RQ, float("-inf"))


def _capped(scores: Tensor, scoring: Scoring) -> Tensor:
    return scores if scoring.softcap is None else (scores / scoring.softcap).tanh_().mul_(scoring.softcap)


class Rounds(NamedTuple):
    """From block ``start`` to ``stop``, ``rounds`` times a run of as many blocks of every lane, lanes in order."""

    start: int
    stop: int
    rounds: int


class Even(NamedTuple):
    """The blocks of all lanes, where these have ``tokens`` each and only places behind them are free.

    So it is where rows of one length decode, until tokens are evicted.
    """

    store: Pool
    rounds: list[Rounds]
    tokens: int


def even_lanes(pool: Pool, layout: BlockLayout, most: int) -> Even | None:
    """What a pool holds, if its lanes are even and it is one storage of at most so many blocks."""
    storages = pool.held(layout)
    store, own = storages[0]
    if len(storages) > 1 or layout.capacity > min(most, store.step):
        return None
    rounds = own.of_blocks("even", lambda: _even_rounds(own))
    return None if rounds is None else Even(store, rounds, int(own.lengths_R[0]))


def _even_rounds(layout: BlockLayout) -> list[Rounds] | None:
    lanes, lengths_R, found, blocks, length = layout.lanes, layout.lengths_R, [], 0, 0
    for start, stop, length, lane_r in _stretches(layout.owner_N.numpy()):
        rounds, rest = divmod(len(lane_r), lanes)
        if rest or (lane_r.reshape(rounds, lanes) != np.arange(lanes)).any():
            return None
        found.append(Rounds(start, stop, rounds))
        blocks += rounds * length
    if not found or bool((lengths_R != lengths_R[0]).any()) or blocks * layout.block < lengths_R[0]:
        return None
    last_R = found[-1].stop - 1 - length * torch.arange(lanes - 1, -1, -1)
    return found if torch.equal(last_R, layout.last_R) else None


def _stretches(owner_n: npt.NDArray[np.int64]) -> list[tuple[int, int, int, npt.NDArray[np.int64]]]:
    """Runs of one lane, as long as their neighbours: first block, the one behind, blocks of a run, lane of each run.

    Blocks of no lane are left out.
    """
    edges = np.flatnonzero(np.diff(owner_n, prepend=-2, append=-2))
    lane_r, length_r = owner_n[edges[:-1]], np.diff(edges)
    cuts = np.flatnonzero(np.diff(np.where(lane_r < 0, -1, length_r), prepend=0, append=0))
    return [
        (int(edges[first]), int(edges[behind]), int(length_r[first]), lane_r[first:behind])
        for first, behind in pairwise(cuts.tolist())
        if lane_r[first] >= 0
    ]


def over_even(q_RQE: Tensor, even: Even, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """:func:`over_blocks` of even lanes."""
    out_RQE, score_RQM, weight_RQM = weighted_even(q_RQE, even, scoring)
    return out_RQE, score_RQM.amax(-1) - weight_RQM.amax(-1).log()


def weighted_even(q_RQE: Tensor, even: Even, scoring: Scoring, newest: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Out [R, Q, E], and scores and weights [R, Q, M] of every place; those of a query are neighbours.

    Most texts are decoded here, and where little is cached the time is that of the number of operations.

    Args:
        newest: how many of the last tokens of every lane the queries are of, each in its turn; causal.
    """
    lanes, queries, size = q_RQE.shape
    wide, q_REQ, scores, values = torch.promote_types(q_RQE.dtype, torch.float32), (q_RQE * scoring.scale).mT, [], []
    for start, stop, rounds in even.rounds:
        k_nCE, v_nCE = even.store.read(slice(start, stop), q_RQE.device)
        values.append(v_nCE.view(rounds * lanes, -1, size))
        # Keys first: few rows times many columns take twice as long.
        k_gME = k_nCE.view(rounds * lanes, -1, size)
        if rounds == 1:
            scores.append(torch.bmm(k_gME, q_REQ).mT)
        else:
            score_gMQ = torch.bmm(k_gME, q_REQ.mT.repeat(rounds, 1, 1).mT)
            scores.append(score_gMQ.view(rounds, lanes, -1, queries).permute(1, 3, 0, 2).flatten(2))
    score_RQM = _capped(_as(torch.cat(scores, dim=2), wide), scoring)
    score_RQM[..., even.tokens :] = float("-inf")
    if newest > 1:
        newest_RGTT = score_RQM.view(lanes, -1, newest, score_RQM.shape[2])[..., even.tokens - newest : even.tokens]
        newest_RGTT.masked_fill_(_behind(newest, q_RQE.device), float("-inf"))
    weight_RQM = score_RQM.softmax(-1)
    cast_RQM, at, parts_RQE = _as(weight_RQM, values[0].dtype), 0, []
    for (_, _, rounds), v_gME in zip(even.rounds, values, strict=True):
        places = rounds * v_gME.shape[1]
        weight_gQM, at = cast_RQM[..., at : at + places], at + places
        if rounds > 1:
            weight_gQM = weight_gQM.view(lanes, queries, rounds, -1).permute(2, 0, 1, 3).flatten(0, 1)
        part_gQE = _as(torch.bmm(weight_gQM, v_gME), wide)
        parts_RQE.append(part_gQE if rounds == 1 else part_gQE.view(rounds, lanes, queries, size).sum(0))
    return sum(parts_RQE[1:], parts_RQE[0]), score_RQM, weight_RQM


def _behind(tokens: int, device: torch.device) -> Tensor:
    """Which of so many tokens are behind which: [T, T]."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu_(1)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To a dtype; where it is that already, without the price of an operation."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


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
        stretches = _stretches(lanes_n)
        if len(stretches) * _LONG > len(lanes_n):
            return [each]
        found = []
        for start, stop, length, lane_r in stretches:
            lane_g = torch.from_numpy(lane_r).to(owner_n.device)
            pieces = max(n for n in range(1, _LONG + 1) if length % n == 0)
            found.append(Group(start, stop, length, lane_g, pieces, lane_g.repeat_interleave(length // pieces)))
        return found

    groups: list[Group] = layout.of_blocks(("groups", part.start, part.stop, owner_n.device), find)
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
