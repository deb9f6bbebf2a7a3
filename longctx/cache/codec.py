"""How a row of a key or value is stored: as it is, or as 8- or 4-bit numbers with a scale and an offset per group.

Legend: E head dim, g numbers per group; ``...`` any leading shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.errors import ConfigError

Stored = tuple[Tensor, ...]
"""Tensors [..., n] that together hold rows [..., E]."""


@dataclass(frozen=True)
class Codec:
    """Rounds every group of a row to ``bits`` bits between its lowest and its highest number.

    Args:
        bits: 4, 8, or None: rows are stored as they are.
        group: numbers that share a scale; a row shorter than it is one group.

    Raises:
        ConfigError: bits or group that cannot be.
    """

    bits: int | None = None
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (None, 4, 8):
            raise ConfigError(f"a cache of {self.bits} bits is not known; use 4, 8, or none for the model's precision")
        if self.group < 1:
            raise ConfigError(f"a group of {self.group} numbers; use 1 or more")

    def encode(self, x: Tensor) -> Stored:
        """Rows [..., E] as they are stored.

        Raises:
            ConfigError: E is no multiple of the group, or odd at 4 bits.
        """
        if self.bits is None:
            return (x,)
        size = x.shape[-1]
        group = min(self.group, size)
        if size % group or (self.bits == 4 and size % 2):
            raise ConfigError(f"rows of {size} numbers do not fit groups of {group} at {self.bits} bits")
        parts = x.reshape(*x.shape[:-1], size // group, group).float()
        low, high = parts.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / (2**self.bits - 1)).to(x.dtype)
        low = low.to(x.dtype)
        safe = scale.float().where(scale > 0, 1.0)
        codes = ((parts - low.float()) / safe).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        if self.bits == 4:
            codes = codes[..., ::2] | (codes[..., 1::2] << 4)
        return codes, scale[..., 0], low[..., 0]

    def decode(self, stored: Stored) -> Tensor:
        """Rows [..., E] in the dtype they were stored from."""
        if self.bits is None:
            return stored[0]
        codes, scale, low = stored
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        parts = codes.reshape(*scale.shape, codes.shape[-1] // scale.shape[-1]).to(scale.dtype)
        return torch.addcmul(low[..., None], parts, scale[..., None]).flatten(-2)
