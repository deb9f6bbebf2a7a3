"""Expected attention: what queries to come will see in a key, before there are any (arXiv 2510.00636).

Queries before their rotation are taken as drawn from a normal distribution, whose mean and covariance are those of the
last queries. Rotated by the mean rotation over the positions to come, they give the expected weight of a key k:
``E exp(q k / sqrt(E)) = exp(mean k / sqrt(E) + k cov k / 2 E)``, of which a softmax over keys is taken.

Legend: B batch, K kv heads, H query heads, G = H / K, T tokens, W last queries, E head dim.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from longctx.cache.ranks import Ranks
from longctx.cache.rotation import Rotation
from longctx.cache.scorers import Scorer, shares
from longctx.errors import ConfigError, UnsupportedError

_TOKENS = 1024
"""Tokens whose logits are made at a time."""


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Expected attention weight, averaged over the heads of a group, times the norm of the value (section 3).

    Args:
        window: last queries whose mean and covariance are taken; of all a prompt has, kvpress takes them.
        n_future: positions to come, over which the rotation is averaged.
        sinks: first tokens of a row; neither their queries nor their keys are looked at, and they stay.
        use_covariance: whether the covariance enters; without, the weight of the mean query.
        use_vnorm: whether weights, plus ``epsilon``, are multiplied with the norm of the value.
        rotation: of the keys; the cache says it.

    Raises:
        ConfigError: sizes that cannot be.
    """

    window: int = 256
    n_future: int = 512
    sinks: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0
    rotation: Rotation | None = field(default=None, repr=False, compare=False)
    rotates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.window, self.n_future) < 1 or min(self.sinks, self.epsilon) < 0:
            raise ConfigError(
                f"ExpectedAttention: window {self.window} and n_future {self.n_future} are 1 or more, sinks "
                f"{self.sinks} and epsilon {self.epsilon} 0 or more"
            )

    @property
    def queries(self) -> int:  # type: ignore[override]
        """See :class:`Scorer`."""
        return self.window

    def bound(self, rotation: Rotation | None) -> "ExpectedAttention":
        """See :class:`Scorer`.

        Raises:
            UnsupportedError: the rotation is not known.
        """
        if rotation is None:
            raise UnsupportedError(
                "ExpectedAttention rotates queries to positions to come, and how this model rotates is not known or "
                "depends on the length; use another scorer, such as SnapKV"
            )
        return replace(self, rotation=rotation)

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`."""
        assert queries_BHWE is not None
        first_BKT = positions_BKT < self.sinks
        logits_BKGT = self._logits(keys_BKTE, *self._statistics(queries_BHWE, ranks.seen))
        logits_BKGT = logits_BKGT.masked_fill(first_BKT[:, :, None], float("-inf"))
        score_BKT = shares(logits_BKGT, ranks).mean(2)
        if self.use_vnorm:
            score_BKT = (score_BKT + self.epsilon) * values_BKTE.double().norm(dim=-1)
        return score_BKT.masked_fill(first_BKT, float("inf")).float()

    def _statistics(self, queries_BHWE: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Mean [B, H, E] and covariance [B, H, E, E] of queries at the positions to come, fp64."""
        assert self.rotation is not None
        window, size = queries_BHWE.shape[2:]
        at_W = seen - window + torch.arange(window, device=queries_BHWE.device)
        plain_BHWE = self.rotation.moved(queries_BHWE.double(), -at_W)
        plain_BHWE = plain_BHWE[:, :, at_W >= self.sinks] if seen > self.sinks else plain_BHWE
        mean_BHE = plain_BHWE.mean(2)
        centred_BHWE = plain_BHWE - mean_BHE[:, :, None]
        covariance_BHEE = centred_BHWE.mT @ centred_BHWE / plain_BHWE.shape[2]
        ahead_EE = self.rotation.mean(seen, self.n_future, size).to(plain_BHWE.device)
        return mean_BHE @ ahead_EE.T, ahead_EE @ covariance_BHEE @ ahead_EE.T

    def _logits(self, keys_BKTE: Tensor, mean_BHE: Tensor, covariance_BHEE: Tensor) -> Tensor:
        """Log of the expected weights [B, K, G, T], fp64."""
        batch, kv_heads, _, size = keys_BKTE.shape
        mean_BKGE = mean_BHE.view(batch, kv_heads, -1, size)
        covariance_BKGEE = covariance_BHEE.view(batch, kv_heads, -1, size, size)
        parts = []
        for part_BKTE in torch.split(keys_BKTE, _TOKENS, dim=2):
            key_BK1TE = part_BKTE.double()[:, :, None]
            logits_BKGT = (key_BK1TE @ mean_BKGE[..., None])[..., 0] / size**0.5
            if self.use_covariance:
                logits_BKGT += (key_BK1TE @ covariance_BKGEE).mul_(key_BK1TE).sum(-1) / (2 * size)
            parts.append(logits_BKGT)
        return torch.cat(parts, dim=-1)
