"""How a cache of keys and values is stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import ConfigError, UnsupportedError
from longctx.runtime.mesh import Group
from longctx.sequence.collectives.ledger import Ledger


@dataclass(frozen=True)
class CacheOptions:
    """Storage of every layer's keys and values.

    Args:
        block: tokens per block.
        bits: 8 or 4: keys and values are rounded (:class:`longctx.cache.codec.Codec`); None: kept as they are.
        group: numbers of a row that share a scale, where they are rounded.
        ranks: ranks over which the tokens of every layer are spread, block by block in turn; all of them decode the
            same tokens. None: this one alone.
        ledger: records what they exchange.

    Raises:
        ConfigError: a block without tokens.
    """

    block: int = 64
    bits: int | None = None
    group: int = 32
    ranks: Group | None = None
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"a block of {self.block} tokens; use 1 or more")

    def check_unrounded(self, why: str) -> None:
        """Refuse ``bits`` where nothing would be rounded.

        Raises:
            UnsupportedError: ``bits`` is set.
        """
        if self.bits is not None:
            raise UnsupportedError(f"a cache of {self.bits} bits has no effect: {why}; leave the bits out")

    def owned(self, position: Tensor) -> Tensor:
        """Which positions this rank keeps."""
        if self.ranks is None or self.ranks.size == 1:
            return torch.ones_like(position, dtype=torch.bool)
        return position // self.block % self.ranks.size == self.ranks.rank
