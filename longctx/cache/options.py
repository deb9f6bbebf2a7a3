"""How a cache of keys and values is stored."""

from dataclasses import dataclass

from longctx.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class CacheOptions:
    """Storage of every layer's keys and values.

    Args:
        block: tokens per block.
        bits: 8 or 4: keys and values are rounded (:class:`longctx.cache.codec.Codec`); None: kept as they are.
        group: numbers of a row that share a scale, where they are rounded.

    Raises:
        ConfigError: a block without tokens.
    """

    block: int = 64
    bits: int | None = None
    group: int = 32

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
