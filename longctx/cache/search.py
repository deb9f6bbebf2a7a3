"""Attention of a few queries to only some of the tokens that a cache holds: exact over those, blind to the rest.

A search proposes tokens for every query with a number that says how promising each is; the most promising ones over
all ranks, as many as its budget says, are attended to exactly, and ranks join their parts as they do for all tokens.
Ranks compare by :func:`longctx.cache.select.select`: 16 KB of counts per query are summed, however many tokens there
are.
Nothing is evicted: the next query may look elsewhere. Passes of more than :attr:`Search.few` new tokens, chunks of a
prompt, look at everything.

Legend: B batch, T new tokens, K kv heads, G query heads per kv head, H = K x G, R = B x K lanes, Q = G x T queries of a
lane, n tokens of a lane on this rank, M proposed tokens, E head dim.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from longctx.attention.kernels import Scoring
from longctx.cache.select import ranked, select

if TYPE_CHECKING:
    from longctx.cache.ragged import RaggedKV


_NUMBERS = 1 << 24
"""Numbers of keys, and as many of values, that are copied at a time; one query's at least."""


class Proposed(NamedTuple):
    """Tokens of one lane on this rank for each of its queries.

    Args:
        token_QM: by place in the lane, each at most once per query.
        position_QM: theirs.
        score_QM: the highest are attended to, equal ones the later first; -inf: never.
    """

    token_QM: Tensor
    position_QM: Tensor
    score_QM: Tensor


class Search(ABC):
    """Says which tokens a query looks at."""

    few: ClassVar[int] = 16
    """New tokens per pass up to which it is asked: a step of decoding, or proposals that are verified."""
    turns_keys: ClassVar[bool] = False
    """Whether keys are stored otherwise than they come."""

    def for_layer(self, layer: int, layers: int) -> "Search":
        """As one of ``layers`` layers needs it."""
        return self

    def keys(self, k_BTKE: Tensor) -> Tensor:
        """Rotated keys as they are stored."""
        return k_BTKE

    def queries(self, q_BTHE: Tensor, kv_heads: int) -> Tensor:
        """Rotated queries as the stored keys need them."""
        return q_BTHE

    @abstractmethod
    def propose(
        self, q_RQE: Tensor, at_RQ: Tensor, cache: "RaggedKV", window: int | None
    ) -> tuple[list[Proposed], Tensor]:
        """Tokens of every lane, and how many of all ranks' a query looks at, [R, Q].

        Args:
            q_RQE: from :meth:`queries`.
            at_RQ: positions of the queries, which see no later token.
            window: positions that a query sees, its own included.
        """

    def indexed(self, cache: "RaggedKV") -> Any:
        """What stands beside a cache whose tokens have been attended to, from ``cache.index``. A value."""
        return None

    def cut(self, index: Any, before: int) -> Any:
        """What :meth:`indexed` gave without the tokens from position ``before`` on."""
        return None


def searched(
    q_RQE: Tensor, at_RQ: Tensor, cache: "RaggedKV", scoring: Scoring, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of this rank that the search of the cache looks at, [R, Q, E], and log-sum-exp [R, Q].

    Args:
        q_RQE: as the stored keys need them.
    """
    search = cache.options.search
    assert search is not None
    proposed, budget_RQ = search.propose(q_RQE, at_RQ, cache, window)
    parts = [
        _exact(q_QE, cache, lane, *looked_at, scoring)
        for lane, (q_QE, looked_at) in enumerate(zip(q_RQE, _chosen(proposed, budget_RQ, cache), strict=True))
    ]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def visible(position_QM: Tensor, at_Q: Tensor, window: int | None) -> Tensor:
    """Which positions, [n] or [Q, M], queries at ``at_Q`` see, [Q, M]."""
    seen_QM = position_QM <= at_Q[:, None]
    return seen_QM if window is None else seen_QM & (position_QM > at_Q[:, None] - window)


def lane_positions(cache: "RaggedKV", lane: int) -> Tensor:
    """Of the tokens of one lane, [n], ascending."""
    position_nC = cache.pool.positions(cache.layout.blocks_of(lane))
    return position_nC.flatten()[: int(cache.lengths_R[lane])].long()


def lane_rows(cache: "RaggedKV", stored: tuple[Tensor, ...], lane: int, token_QM: Tensor) -> Tensor:
    """Keys or values [Q, M, E] of some tokens of a lane."""
    ids, block = cache.layout.blocks_of(lane).to(cache.pool.device), cache.layout.block
    token = token_QM.to(ids.device)
    place_QM = ids[token // block] * block + token % block
    return cache.pool.codec.decode(tuple(t.flatten(0, 1)[place_QM] for t in stored)).to(token_QM.device)


def _chosen(proposed: list[Proposed], budget_RQ: Tensor, cache: "RaggedKV") -> list[tuple[Tensor, Tensor]]:
    """Tokens [Q, M] of every lane and which of them are looked at.

    No rank looks at more than its own best ones, so that these alone are compared with those of the others.
    """
    alike = bool((budget_RQ == budget_RQ[:, :1]).all())
    best, most_R = [], budget_RQ.amax(1).tolist()
    for (token_QM, position_QM, score_QM), most in zip(proposed, most_R, strict=True):
        rank_QM = ranked(score_QM, torch.zeros_like(position_QM), position_QM, 1)
        rank_QM, order_QM = rank_QM.topk(min(most, token_QM.shape[1]), dim=1, sorted=not alike)
        best.append((token_QM.gather(1, order_QM), score_QM.gather(1, order_QM) > float("-inf"), rank_QM))
    group = cache.options.ranks
    if group is None or group.size == 1:
        counts = [torch.arange(rank.shape[1], device=rank.device) for _, _, rank in best]
        wanted = [count < budget_Q[:, None] for count, budget_Q in zip(counts, budget_RQ, strict=True)]
    else:
        wanted = _chosen_of_all(best, budget_RQ, cache)
    return [(token, seen & mask) for (token, seen, _), mask in zip(best, wanted, strict=True)]


def _chosen_of_all(best: list[tuple[Tensor, Tensor, Tensor]], budget_RQ: Tensor, cache: "RaggedKV") -> list[Tensor]:
    """Which of this rank's best are among the best of all ranks."""
    queries, device = budget_RQ.shape[1], budget_RQ.device
    sizes = [rank.numel() for _, _, rank in best]
    group_n = torch.cat([
        (lane * queries + torch.arange(queries, device=device))[:, None].expand_as(rank).flatten()
        for lane, (_, _, rank) in enumerate(best)
    ])  # fmt: skip
    rank_n = torch.cat([rank.flatten() for _, _, rank in best])
    kept_n = select(rank_n, group_n, budget_RQ.flatten(), cache.options.ranks, cache.options.ledger)
    return [kept.view_as(rank) for kept, (_, _, rank) in zip(torch.split(kept_n, sizes), best, strict=True)]


def _exact(
    q_QE: Tensor, cache: "RaggedKV", lane: int, token_QM: Tensor, wanted_QM: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention of every query of a lane to its own tokens, as fp32 or fp64; 0 and -inf where it has none."""
    step = max(1, _NUMBERS // max(1, token_QM.shape[1] * q_QE.shape[1]))
    q, token, wanted = (torch.split(t, step) for t in (q_QE, token_QM, wanted_QM))
    parts = [_exact_part(*part, cache, lane, scoring) for part in zip(q, token, wanted, strict=True)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _exact_part(
    q_QE: Tensor, token_QM: Tensor, wanted_QM: Tensor, cache: "RaggedKV", lane: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_QE.dtype, torch.float32)
    k_QME, v_QME = (lane_rows(cache, stored, lane, token_QM) for stored in (cache.pool.k, cache.pool.v))
    score_QM = torch.einsum("qe,qme->qm", q_QE * scoring.scale, k_QME).to(wide)
    if scoring.softcap is not None:
        score_QM = (score_QM / scoring.softcap).tanh() * scoring.softcap
    score_QM = score_QM.masked_fill(~wanted_QM, float("-inf"))
    lse_Q = score_QM.logsumexp(1)
    weight_QM = torch.exp(score_QM - lse_Q.masked_fill(lse_Q.isneginf(), 0)[:, None])
    return torch.einsum("qm,qme->qe", weight_QM.to(v_QME.dtype), v_QME).to(wide), lse_Q
