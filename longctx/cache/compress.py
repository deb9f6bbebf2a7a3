"""Compression of a cache: which scorer, how many tokens may stay, and when.

The budget of a layer is shared by its kv heads equally or, ``adaptive``, goes to the highest scores of all heads of a
row (Feng et al., arXiv 2407.11550), each head keeping at least a ``floor`` of its equal share. What stays is chosen
exactly (:mod:`longctx.cache.select`), on any number of ranks alike. A budget of all that a cache holds changes nothing.

In a layer with a sliding window tokens go once they are behind it, where no later query sees them. They count in no
budget, are not scored, and sinks among them do not stay; the policy chooses among what is left.

Legend: B batch, K kv heads, R = B x K lanes, H query heads, W last queries, E head dim, n tokens of all lanes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from longctx.cache.ranks import Ranks
from longctx.cache.rotation import Rotation
from longctx.cache.scorers import Scorer
from longctx.cache.select import ranked, select
from longctx.errors import ConfigError, UnsupportedError

Lanes = list[tuple[Tensor, Tensor, Tensor]]
"""Keys [n, E], values [n, E] and positions [n] of every lane."""


@dataclass(frozen=True)
class Policy:
    """How many tokens per kv head stay, and which in any case.

    Args:
        ratio: of the tokens seen so far, rounded up; or
        tokens: so many, however many were seen. Exactly one of the two.
        sinks, recent: the first and the last tokens of a row stay; they count.
        every: new tokens after which a cache is compressed again; a prompt in longer chunks after each chunk.
            Generation also compresses at the end of a prompt.
        adaptive: heads of a row share their budgets.
        floor: adaptive: share of its equal budget that a head keeps in any case.
        layers: share of each layer in the budget; they are scaled to a mean of 1. None: equal.
        positions: a token's place in the "text", or in the "cache": what is evicted leaves no gap, so that no distance
            is longer than the cache (StreamingLLM). Windows, sinks and recent tokens are those of the text in both.
            Keys of half precision or few bits that have moved are also kept as they came, so that errors do not add up.
            Scorers that look at some queries need as many recent tokens: queries do not move.

    Raises:
        ConfigError: values that cannot be.
    """

    ratio: float | None = None
    tokens: int | None = None
    sinks: int = 4
    recent: int = 32
    every: int = 512
    adaptive: bool = False
    floor: float = 0.2
    layers: tuple[float, ...] | None = None
    positions: Literal["text", "cache"] = "text"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.tokens is None):
            raise ConfigError("a policy needs either ratio or tokens, the share or the number of tokens that stay")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio {self.ratio} is out of range; use a share above 0 and up to 1")
        if min(self.sinks, self.recent) < 0 or self.every < 1 or not 0 <= self.floor <= 1:
            raise ConfigError("sinks and recent are 0 or more, every is 1 or more, floor from 0 to 1")
        if self.tokens is not None and self.tokens < self.sinks + self.recent:
            raise ConfigError(
                f"tokens {self.tokens} is below the {self.sinks} sinks and {self.recent} recent tokens that always stay"
            )
        if self.positions not in ("text", "cache"):
            raise ConfigError(f"positions {self.positions!r} is not known; use 'text' or 'cache'")
        if self.layers is not None and min(self.layers, default=0) <= 0:
            raise ConfigError("layers needs a share above 0 for every layer")

    def budget(self, seen: int, layer: int) -> int:
        """Tokens per kv head that ``layer`` may keep of ``seen``; never below what is protected."""
        equal = self.tokens if self.tokens is not None else (self.ratio or 1) * seen
        if self.layers is not None:
            equal *= self.layers[layer] * len(self.layers) / sum(self.layers)
        return min(seen, max(math.ceil(equal - 1e-9), self.sinks + self.recent))


@dataclass(frozen=True)
class Compression:
    """A scorer and a policy, for one layer.

    Raises:
        ConfigError: the policy does not protect what the scorer needs.
    """

    scorer: Scorer
    policy: Policy
    layer: int = 0

    def __post_init__(self) -> None:
        if self.scorer.branch is not None and self.policy.recent < 1:
            raise ConfigError(
                f"{type(self.scorer).__name__} does not look at what comes after a token, so the last one must stay in "
                "any case; use recent 1 or more"
            )

    @property
    def rotates(self) -> bool:
        """Whether the rotation of keys must be known."""
        return self.scorer.rotates or self.policy.positions == "cache"

    def bound(self, rotation: Rotation | None) -> "Compression":
        """For keys that are rotated so; None: it is not known how, or depends on the length.

        Raises:
            UnsupportedError: it must be known.
        """
        if rotation is None and self.policy.positions == "cache":
            raise UnsupportedError(
                "positions 'cache' of a policy moves cached keys, and how this model rotates them is not known or "
                "depends on the length; use positions 'text'"
            )
        return replace(self, scorer=self.scorer.bound(rotation))


@torch.no_grad()
def kept_tokens(
    tokens: Lanes, kv_heads: int, queries_BHWE: Tensor | None, compression: Compression, ranks: Ranks,
    worths: Sequence[Tensor] | None = None, device: torch.device | None = None,
) -> list[Tensor] | None:  # fmt: skip
    """Which tokens of every lane stay, as masks; None: all.

    Args:
        tokens: those of every lane on this rank.
        worths: fp32 [n] of every lane, where layers report scores.
        device: where tokens are scored, one row after the other; None: where they are.
    """
    policy, lanes = compression.policy, len(tokens)
    budget = policy.budget(ranks.seen, compression.layer)
    lengths_R = torch.tensor([len(position) for _, _, position in tokens])
    if bool((ranks.total(lengths_R) <= budget).all()):
        return None
    scores = worths or _scores(tokens, kv_heads, queries_BHWE, compression.scorer, ranks, device)
    score_n = torch.cat(list(scores)).cpu()
    position_n = torch.cat([position for _, _, position in tokens]).cpu()
    lane_n = torch.repeat_interleave(torch.arange(lanes), lengths_R)
    always_n = (position_n < policy.sinks) | (position_n >= ranks.seen - policy.recent)
    score_n = score_n.masked_fill(always_n, float("inf"))
    rank_n = ranked(score_n, lane_n, position_n, lanes)
    each_R = torch.full((lanes,), budget)
    if not policy.adaptive:
        kept_n = select(rank_n, lane_n, each_R, ranks.group, ranks.ledger)
    else:
        least_R = torch.full((lanes,), max(math.ceil(policy.floor * budget), policy.sinks + policy.recent))
        safe_n = select(rank_n, lane_n, least_R, ranks.group, ranks.ledger)
        rank_n = ranked(score_n.masked_fill(safe_n, float("inf")), lane_n, position_n, lanes)
        rows_B = torch.full((lanes // kv_heads,), budget * kv_heads)
        kept_n = select(rank_n, lane_n // kv_heads, rows_B, ranks.group, ranks.ledger)
    return list(torch.split(kept_n, lengths_R.tolist()))


def _scores(
    tokens: Lanes, kv_heads: int, queries_BHWE: Tensor | None, scorer: Scorer, ranks: Ranks,
    device: torch.device | None,
) -> list[Tensor]:  # fmt: skip
    """Scores [n] of every lane; rows whose heads hold equally many tokens are scored in one."""
    found = []
    for row in range(len(tokens) // kv_heads):
        own = tokens[row * kv_heads : (row + 1) * kv_heads]
        q_1HWE = None if queries_BHWE is None else queries_BHWE[row : row + 1]
        heads = [slice(0, kv_heads)]
        if bool(ranks.highest(torch.tensor([int(len({len(p) for _, _, p in own}) > 1)]))[0]):
            heads = [slice(head, head + 1) for head in range(kv_heads)]
        for part in heads:
            k, v, position = (torch.stack(tensors)[None].to(device) for tensors in zip(*own[part], strict=True))
            group = 0 if q_1HWE is None else q_1HWE.shape[1] // kv_heads
            q = None if q_1HWE is None else q_1HWE[:, part.start * group : part.stop * group]
            found += list(scorer.score(k, v, q, position, ranks)[0])
    return found
