"""Loki: keys are ranked by a few coordinates, and the best are attended to exactly.

Singhania et al., arXiv 2406.02542. Keys are cached in a basis of principal components (:mod:`longctx.cache.bases`),
queries are written in it, too: no score changes. A step ranks all keys of a query head by their dot product in the
first coordinates alone, and attends exactly to the best. The memory stays the same; what is read per step is the first
coordinates of all keys, and the keys and values of the chosen tokens.

Every query head chooses for itself, as in the paper, which repeats kv heads. Beyond the paper: recent tokens may be
among the chosen in any case (the authors' code computes such a window and does not use it).

Legend: B batch, T tokens, K kv heads, H query heads, G = H / K, R = B x K lanes, Q = G x T queries of a lane,
n tokens of a lane on this rank, E head dim, r coordinates of a key that are looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from longctx.cache.bases import check_shape
from longctx.cache.search import Proposed, Search, lane_positions, visible
from longctx.errors import ConfigError

if TYPE_CHECKING:
    from longctx.cache.ragged import RaggedKV


@dataclass(frozen=True, eq=False)
class Loki(Search):
    """See the top of this file.

    On ranks the chosen tokens are the best of all ranks, the same as on one rank but for scores that rounding makes
    equal.

    Args:
        bases: orthogonal [K, E, E] for every layer that caches keys.
        rank: coordinates that keys are ranked by; None: a quarter of the head's.
        ratio: of the tokens that a query sees, rounded up; or
        tokens: so many. Exactly one of the two.
        recent: the last tokens are chosen in any case; they count.

    Raises:
        ConfigError: values that cannot be.
    """

    turns_keys: ClassVar[bool] = True

    bases: Mapping[int, Tensor] = field(repr=False)
    rank: int | None = None
    ratio: float | None = None
    tokens: int | None = None
    recent: int = 0
    layer: int | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.tokens is None):
            raise ConfigError("Loki needs either ratio or tokens, the share or the number of tokens it looks at")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError(f"Loki's ratio {self.ratio} is out of range; use a share above 0 and up to 1")
        for name, value, least in (("tokens", self.tokens, 1), ("rank", self.rank, 1), ("recent", self.recent, 0)):
            if value is not None and value < least:
                raise ConfigError(f"Loki's {name} is {value}; use {least} or more")

    def for_layer(self, layer: int, layers: int) -> "Loki":
        """See :class:`Search`."""
        return replace(self, layer=layer)

    def keys(self, k_BTKE: Tensor) -> Tensor:
        """See :class:`Search`.

        Raises:
            ConfigError: the bases are of other layers or heads, or have fewer coordinates than ``rank``.
        """
        return _turned(k_BTKE, self._basis(*k_BTKE.shape[2:]))

    def queries(self, q_BTHE: Tensor, kv_heads: int) -> Tensor:
        """See :class:`Search`."""
        q_BTKGE = q_BTHE.reshape(*q_BTHE.shape[:2], kv_heads, -1, q_BTHE.shape[3])
        return _turned(q_BTKGE, self._basis(kv_heads, q_BTHE.shape[3])).flatten(2, 3)

    def propose(
        self, q_RQE: Tensor, at_RQ: Tensor, cache: "RaggedKV", window: int | None
    ) -> tuple[list[Proposed], Tensor]:
        """See :class:`Search`."""
        found = [self._of_lane(q_RQE[lane], at_RQ[lane], cache, lane, window) for lane in range(len(q_RQE))]
        return found, self.budget(at_RQ, window)

    def budget(self, at_RQ: Tensor, window: int | None) -> Tensor:
        """Tokens that queries at these positions look at."""
        seen_RQ = at_RQ + 1 if window is None else (at_RQ + 1).clamp_max(window)
        if self.ratio is None:
            wanted_RQ = torch.full_like(seen_RQ, self.tokens or 0)
        else:
            wanted_RQ = (self.ratio * seen_RQ.double() - 1e-9).ceil().long()
        return wanted_RQ.clamp_min(self.recent).minimum(seen_RQ)

    def _of_lane(self, q_QE: Tensor, at_Q: Tensor, cache: "RaggedKV", lane: int, window: int | None) -> Proposed:
        position_n = lane_positions(cache, lane).to(q_QE.device)
        wide, rank = torch.promote_types(q_QE.dtype, torch.float32), self._rank(q_QE.shape[1])
        k_nr = _first_coordinates(cache, lane, rank).to(q_QE.device, wide)
        score_Qn = q_QE[:, :rank].to(wide) @ k_nr.mT
        if self.recent:
            score_Qn = score_Qn.masked_fill(position_n > at_Q[:, None] - self.recent, float("inf"))
        score_Qn = score_Qn.masked_fill(~visible(position_n, at_Q, window), float("-inf"))
        token_n = torch.arange(len(position_n), device=q_QE.device)
        return Proposed(token_n.expand_as(score_Qn), position_n.expand_as(score_Qn), score_Qn)

    def _rank(self, size: int) -> int:
        return max(1, size // 4) if self.rank is None else self.rank

    def _basis(self, kv_heads: int, size: int) -> Tensor:
        if self.layer is None or self.layer not in self.bases:
            known = ", ".join(map(str, sorted(self.bases))) or "none"
            raise ConfigError(f"there are no key bases of layer {self.layer} but of {known}; calibrate this model")
        basis_KEE = self.bases[self.layer]
        check_shape(basis_KEE, kv_heads, size, self.layer)
        if self._rank(size) > size:
            raise ConfigError(f"Loki's rank {self.rank} is above the {size} coordinates of a head; use fewer")
        return basis_KEE


def _turned(x_BTKgE: Tensor, basis_KEE: Tensor) -> Tensor:
    """Rows [B, T, K, E] or [B, T, K, G, E] in the basis of their head, multiplied in fp32 or wider."""
    wide = torch.promote_types(x_BTKgE.dtype, torch.float32)
    rows = x_BTKgE if x_BTKgE.dim() == 5 else x_BTKgE[..., None, :]
    turned = rows.to(wide) @ basis_KEE.to(x_BTKgE.device, wide)
    return turned.view_as(x_BTKgE).to(x_BTKgE.dtype)


def _first_coordinates(cache: "RaggedKV", lane: int, rank: int) -> Tensor:
    """Of every key of a lane, [n, r]; nothing else is read of keys that are not rounded."""
    pool, ids = cache.pool, cache.layout.blocks_of(lane).to(cache.pool.device)
    if pool.codec.bits is None:
        k_NCr = pool.k[0][..., :rank][ids]
    else:
        k_NCr = pool.codec.decode(tuple(t[ids] for t in pool.k))[..., :rank]
    return k_NCr.flatten(0, 1)[: int(cache.lengths_R[lane])]
