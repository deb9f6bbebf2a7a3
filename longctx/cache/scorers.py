"""How much a token in the cache is worth: one number per row, kv head and token; the highest stay.

A scorer sees the tokens that this rank holds and asks the others through :class:`Ranks` for what needs all of them, so
that ranks give the same scores as one.

Legend: B batch, K kv heads, H query heads, G = H / K, T tokens, W last queries, E head dim.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from longctx.cache.ranks import Ranks
from longctx.cache.rotation import Rotation
from longctx.errors import ConfigError


class Scorer(ABC):
    """Scores tokens of a cache."""

    queries: ClassVar[int] = 0
    """Last queries that it looks at."""

    rotates: ClassVar[bool] = False
    """Whether it must know how keys are rotated."""

    branch: ClassVar[str | None] = None
    """Part of a decoder layer that reports a number for every token, which then is its score."""

    def bound(self, rotation: Rotation | None) -> "Scorer":
        """The scorer of a cache whose keys are rotated so; None: it is not known how."""
        return self

    @abstractmethod
    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """Scores [B, K, T] in fp32 of the tokens of this rank.

        Args:
            keys_BKTE, values_BKTE: rotated keys, and values.
            queries_BHWE: the last rotated queries, that of the newest token last; None where :attr:`queries` is 0.
            positions_BKT: of the tokens in their sequence, ascending.
        """


@dataclass(frozen=True)
class Random(Scorer):
    """The control: a number that depends on seed and position alone."""

    seed: int = 0

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`."""
        x = (positions_BKT.long() + self.seed * 1_000_003) & 0xFFFFFFFF
        for _ in range(2):  # mixes 32 bits, every one of them with every other
            x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
        return ((x >> 16) ^ x).double().div(2**32).float()


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Keys of small norm draw much attention (Devoto et al., arXiv 2406.11430): minus the norm."""

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`."""
        norm_BKT: Tensor = keys_BKTE.float().norm(dim=-1)
        return -norm_BKT


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keys unlike the others stay (Park et al., arXiv 2504.15364): minus the cosine to the mean of directions."""

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`."""
        directions_BKTE = functional.normalize(keys_BKTE.double(), dim=-1)
        # In fp64, so that it does not show in which order ranks add.
        anchor_BKE = ranks.total(directions_BKTE.sum(2))
        return -functional.cosine_similarity(directions_BKTE, anchor_BKE[:, :, None], dim=-1).float()


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention of the last queries, averaged over them and the heads of a group, smoothed over neighbours.

    Li et al., arXiv 2404.14469. The paper keeps the window itself: protect as many recent tokens as ``window``.

    Args:
        window: queries.
        kernel: neighbouring tokens, an odd number, whose mean a token is given.

    Raises:
        ConfigError: sizes that cannot be.
    """

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(
                f"SnapKV of window {self.window} and kernel {self.kernel}: use 1 or more, and an odd kernel"
            )

    @property
    def queries(self) -> int:  # type: ignore[override]
        """See :class:`Scorer`."""
        return self.window

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`."""
        assert queries_BHWE is not None
        weights_BKGWT = attention_weights(keys_BKTE, queries_BHWE, positions_BKT, ranks)
        return ranks.smoothed(weights_BKGWT.mean((2, 3)), positions_BKT, self.kernel)


@dataclass(frozen=True)
class TOVA(Scorer):
    """Attention of the last query, averaged over all heads of a layer (Oren et al., arXiv 2401.06104)."""

    queries: ClassVar[int] = 1

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`; heads must hold the same tokens.

        Raises:
            ConfigError: they do not.
        """
        assert queries_BHWE is not None
        if not (positions_BKT == positions_BKT[:, :1]).all():
            raise ConfigError(
                "TOVA averages over heads, which must hold the same tokens; use no adaptive policy with it"
            )
        weights_BKGWT = attention_weights(keys_BKTE, queries_BHWE, positions_BKT, ranks)
        return weights_BKGWT.mean((1, 2, 3))[:, None].expand(-1, keys_BKTE.shape[1], -1).float()


@dataclass(frozen=True)
class Recency(Scorer):
    """Later tokens stay: with protected first ones, StreamingLLM's sinks and window (Xiao et al., arXiv 2309.17453).

    The paper counts positions inside the cache, which a policy with ``positions="cache"`` does.
    """

    def score(
        self, keys_BKTE: Tensor, values_BKTE: Tensor, queries_BHWE: Tensor | None, positions_BKT: Tensor, ranks: Ranks
    ) -> Tensor:
        """See :class:`Scorer`; positions up to 2 ** 24 are exact in fp32."""
        return positions_BKT.float()


def attention_weights(keys_BKTE: Tensor, queries_BHWE: Tensor, positions_BKT: Tensor, ranks: Ranks) -> Tensor:
    """Softmax over the tokens of all ranks, [B, K, G, W, T], fp64; a query sees no token behind its own."""
    batch, heads, window, size = queries_BHWE.shape
    keys, kv_heads = keys_BKTE.double(), keys_BKTE.shape[1]
    q_BKGWE = queries_BHWE.double().view(batch, kv_heads, heads // kv_heads, window, size)
    logits = torch.einsum("bkgwe,bkte->bkgwt", q_BKGWE, keys) * size**-0.5
    at_W = ranks.seen - window + torch.arange(window, device=keys.device)
    logits.masked_fill_(positions_BKT[:, :, None, None] > at_W[:, None], float("-inf"))
    return shares(logits, ranks)


def shares(logits: Tensor, ranks: Ranks) -> Tensor:
    """Softmax over the last dimension, the tokens of all ranks, in fp64; 0 where all of them are -inf."""
    none = logits.new_full((*logits.shape[:-1], 1), float("-inf"))
    top = ranks.highest(torch.cat((logits, none), dim=-1).amax(-1)).clamp_min(torch.finfo(torch.float64).min / 2)
    weights = torch.exp(logits - top[..., None])
    total = ranks.total(weights.sum(-1))[..., None]
    return weights / total.where(total > 0, 1.0)
