"""Moving rotated keys by whole positions, and positions that are counted inside the cache.

``R(p + n) = R(n) R(p)``: a key that was rotated for one position is rotated on to any other, whatever cos and sin were
scaled with. Attention sees differences of positions alone. So StreamingLLM's positions (Xiao et al., arXiv 2309.17453,
section 3.2), places in the cache instead of in the text, need no angle to be stored: when tokens are evicted, each that
stays moves forward by as many as went behind it. Tokens behind all that went, and queries, stay as they are.

Legend: E head dim, F = R / 2 rotated pairs, n tokens of one lane, m moved tokens, R lanes; ``...`` any leading shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.cache.layout import BlockLayout
from longctx.cache.pool import Pool
from longctx.cache.ranks import Ranks
from longctx.positions.rope import RotaryEmbedding


@dataclass(frozen=True, eq=False)
class Rotation:
    """Feature f of a head is paired with feature f + F and turned by ``frequencies_F[f]`` radians per position.

    Args:
        frequencies_F: fp64, on the host. Features from 2 F on are not rotated.
    """

    frequencies_F: Tensor

    @classmethod
    def of(cls, rope: RotaryEmbedding, dtype: torch.dtype) -> "Rotation | None":
        """That of keys in ``dtype``; None where frequencies depend on the length, so that keys cannot be moved."""
        if rope.rope.rope_type in ("dynamic", "longrope"):
            return None
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(rope.inv_freq(1, precise).double())

    def moved(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotated heads [..., E] as they are so many positions later, in their dtype.

        Args:
            by: whole positions [...], below 0 for back; broadcast. Angles are fp64.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        angles = by.to(x.device, torch.float64)[..., None] * self.frequencies_F.to(x.device)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        rotated = 2 * len(self.frequencies_F)
        first, second = x[..., :rotated].to(wide).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        return torch.cat((turned, x[..., rotated:]), dim=-1)

    def mean(self, first: int, count: int, size: int) -> Tensor:
        """Mean over ``count`` positions from ``first`` on of the matrices [E, E] that rotate a head of ``size`` E."""
        angles = torch.arange(first, first + count, dtype=torch.float64)[:, None] * self.frequencies_F
        pairs = len(self.frequencies_F)
        matrix_EE, at = torch.eye(size, dtype=torch.float64), torch.arange(pairs)
        matrix_EE[at, at] = matrix_EE[at + pairs, at + pairs] = angles.cos().mean(0)
        matrix_EE[at + pairs, at] = angles.sin().mean(0)
        matrix_EE[at, at + pairs] = -angles.sin().mean(0)
        return matrix_EE


def evicted_behind(positions: Sequence[Tensor], kept: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """How many of the tokens that go now lie behind each that stays, by lane, over all ranks.

    Args:
        positions: [n] of every lane's tokens on this rank, ascending.
        kept: masks over them.
    """
    gone = ranks.merged([p_n[~mask_n.to(p_n.device)] for p_n, mask_n in zip(positions, kept, strict=True)])
    found = []
    for p_n, mask_n, gone_n in zip(positions, kept, gone, strict=True):
        stays_n = p_n[mask_n.to(p_n.device)]
        found.append(len(gone_n) - torch.searchsorted(gone_n, stays_n))
    return found


def close_gaps(pool: Pool, layout: BlockLayout, rotation: Rotation, by: Sequence[Tensor]) -> None:
    """Move keys forward, in place; those that do not move are not touched, and so not rounded again.

    Args:
        pool: of one cache alone.
        by: positions [n] for the tokens of every lane in order.
    """
    blocks, offsets, steps = [], [], []
    for lane, by_n in enumerate(by):
        moves_m = by_n.cpu().nonzero()[:, 0]
        blocks.append(layout.blocks_of(lane)[moves_m // layout.block])
        offsets.append(moves_m % layout.block)
        steps.append(by_n.cpu()[moves_m])
    at = (torch.cat(blocks).to(pool.device), torch.cat(offsets).to(pool.device))
    k_mE = rotation.moved(pool.codec.decode(tuple(t[at] for t in pool.k)), torch.cat(steps))
    for tensor, part in zip(pool.k, pool.codec.encode(k_mE), strict=True):
        tensor[at] = part
