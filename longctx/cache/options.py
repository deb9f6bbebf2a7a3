"""How a cache of keys and values is stored."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from longctx.cache.compress import Compression
from longctx.cache.layout import BlockLayout
from longctx.cache.rotation import Rotation
from longctx.cache.search import Search
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
        compression: which tokens stay where not all may; None: all.
        search: which tokens the queries of a step look at, of all that stay; None: all.
        offload: newest tokens of every kv head that stay on the model's device, in whole blocks; what is older lies in
            the memory of the host (:mod:`longctx.cache.tiers`), on every rank. None: all stay.
        starts: layouts before the first token by number of lanes; layers that share them find places once for all.

    Raises:
        ConfigError: a block without tokens; a compression and a search; an offload and a search, or keys that move.
    """

    block: int = 64
    bits: int | None = None
    group: int = 32
    ranks: Group | None = None
    ledger: Ledger | None = None
    compression: Compression | None = None
    search: Search | None = None
    offload: int | None = None
    starts: dict[int, BlockLayout] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"a block of {self.block} tokens; use 1 or more")
        if self.search is not None and self.compression is not None:
            raise ConfigError(
                f"{type(self.search).__name__} chooses among all tokens of a cache, and a compression evicts some; "
                "leave search or compression out"
            )
        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload is None:
            return
        if self.offload < 0:
            raise ConfigError(f"an offload of all but {self.offload} tokens; use 0 or more")
        if self.search is not None:
            raise ConfigError(
                f"{type(self.search).__name__} looks up keys of a whole cache on its device, and an offload moves old "
                "ones to the host; leave search or offload out"
            )
        if self.moves:
            raise ConfigError(
                "positions 'cache' of a policy moves cached keys on their device, and an offload moves old ones to the "
                "host; use positions 'text', or leave offload out"
            )

    def check_plain(self, why: str) -> None:
        """Refuse what would have no effect where no keys and values are cached.

        Raises:
            UnsupportedError: bits, ranks, a compression, a search or an offload are set.
        """
        found = {
            "bits": self.bits, "compression": self.compression, "search": self.search, "ranks": self.ranks,
            "offload": self.offload,
        }  # fmt: skip
        for name, value in found.items():
            if value is not None:
                raise UnsupportedError(f"{name} of a cache have no effect: {why}; leave them out")

    def start(self, lanes: int) -> BlockLayout:
        """The layout before the first token."""
        return self.starts.setdefault(lanes, BlockLayout.empty(lanes, self.block))

    def for_layer(self, layer: int, layers: int) -> "CacheOptions":
        """As the caches of one of ``layers`` layers need them.

        Raises:
            ConfigError: the policy has shares for another number of layers, or the search knows other layers.
        """
        if self.search is not None:
            return replace(self, search=self.search.for_layer(layer, layers))
        if self.compression is None:
            return self
        shares = self.compression.policy.layers
        if shares is not None and len(shares) != layers:
            raise ConfigError(
                f"the policy has shares of {len(shares)} layers and the model {layers}; give one for each"
            )
        return replace(self, compression=replace(self.compression, layer=layer))

    @property
    def moves(self) -> bool:
        """Whether keys move when tokens are evicted."""
        return self.compression is not None and self.compression.policy.positions == "cache"

    @property
    def branch(self) -> str | None:
        """Part of a decoder layer that reports how much tokens are worth; None: none is asked to."""
        return None if self.compression is None else self.compression.scorer.branch

    def bound(self, rotation: Rotation | None) -> "CacheOptions":
        """For keys that are rotated so (see :meth:`Compression.bound`)."""
        return self if self.compression is None else replace(self, compression=self.compression.bound(rotation))

    @property
    def owns_all(self) -> bool:
        """Whether this rank keeps every token."""
        return self.ranks is None or self.ranks.size == 1

    def owned(self, position: Tensor) -> Tensor:
        """Which positions this rank keeps, on the host; one rank alone waits for no device to tell them."""
        if self.ranks is None or self.ranks.size == 1:
            return torch.ones(position.shape, dtype=torch.bool)
        return position.cpu() // self.block % self.ranks.size == self.ranks.rank
