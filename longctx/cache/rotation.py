"""Moving rotated keys by whole positions, and positions that are counted inside the cache.

``R(p + n) = R(n) R(p)``: a key that was rotated for one position is rotated on to any other, whatever cos and sin were
scaled with. Attention sees differences of positions alone. So StreamingLLM's positions (Xiao et al., arXiv 2309.17453,
section 3.2), places in the cache instead of in the text, need no angle to be stored: when tokens are evicted, each that
stays moves forward by as many as went behind it. Tokens behind all that went, and queries, stay as they are.

Legend: E head dim, F rotated pairs, n tokens of one lane, R lanes, m tokens of all of them; ``...`` any leading shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.cache.codec import Stored
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


class Origin(NamedTuple):
    """Keys that have moved, as they came: those of the first ``counts_R`` tokens of every lane, one lane after another.

    Each move starts from them, so that what moves a thousand times is rounded no more often than what moves once.

    Args:
        k: as the pool stores keys, [m, ...].
        by_m, counts_R: how far each has moved so far, and how many there are; int64 on the host.
    """

    k: Stored
    by_m: Tensor
    counts_R: Tensor

    @classmethod
    def empty(cls, pool: Pool, lanes: int) -> "Origin":
        """No key has moved yet."""
        none = torch.zeros(0, dtype=torch.int64)
        k = pool.codec.encode(pool.none_E.new_empty(0, len(pool.none_E)))
        return cls(k, none, torch.zeros(lanes, dtype=torch.int64))

    def of(self, lanes: Sequence[int]) -> "Origin":
        """That of some lanes."""
        by_lane = torch.split(torch.arange(len(self.by_m)), self.counts_R.tolist())
        row_m = torch.cat([by_lane[lane] for lane in lanes]) if lanes else self.by_m.new_empty(0)
        return Origin(tuple(t[row_m.to(t.device)] for t in self.k), self.by_m[row_m], self.counts_R[list(lanes)])

    def kept(self, kept_R: Sequence[Tensor]) -> "Origin":
        """That of the tokens that stay, as masks over those of every lane in order."""
        masks = [mask_n[:count] for mask_n, count in zip(kept_R, self.counts_R.tolist(), strict=True)]
        stays_m = torch.cat(masks)
        counts_R = torch.stack([mask_n.sum() for mask_n in masks])
        return Origin(tuple(t[stays_m.to(t.device)] for t in self.k), self.by_m[stays_m], counts_R)


def close_gaps(
    pool: Pool, layout: BlockLayout, rotation: Rotation, by: Sequence[Tensor], kept: Sequence[Tensor],
    origin: Origin | None,
) -> Origin | None:  # fmt: skip
    """Move keys forward, in place; those that do not move are not touched.

    Args:
        pool: of one cache alone, with what was kept.
        by: positions [n] for the tokens of every lane in order; they never ascend.
        kept: masks over the tokens of every lane before.
        origin: of these; None: keys are moved from where they are, as where rounding them does not matter.
    """
    from_R = torch.zeros(layout.lanes, dtype=torch.int64)
    if origin is not None:
        from_R = torch.stack([mask_n[:count].sum() for mask_n, count in zip(kept, origin.counts_R, strict=True)])
    by_R = torch.stack([(by_n > 0).sum().cpu() for by_n in by])
    counts_R = torch.maximum(from_R, by_R)
    steps_m = torch.cat([by_n[:count].cpu() for by_n, count in zip(by, counts_R.tolist(), strict=True)])
    at = layout.first_places(counts_R)
    k, by_m = tuple(t[at[0].to(pool.device), at[1].to(pool.device)] for t in pool.k), steps_m
    if origin is not None:
        old = [mask_n[:count] for mask_n, count in zip(kept, origin.counts_R.tolist(), strict=True)]
        k, by_m = _onwards(origin, torch.cat(old), from_R, counts_R, k, steps_m)
    moves_m = steps_m > 0
    to = tuple(index[moves_m].to(pool.device) for index in at)
    k_mE = rotation.moved(pool.codec.decode(tuple(t[moves_m.to(t.device)] for t in k)), by_m[moves_m])
    for tensor, part in zip(pool.k, pool.codec.encode(k_mE), strict=True):
        tensor[to] = part
    return None if origin is None else Origin(k, by_m, counts_R)


def _onwards(
    origin: Origin, stays_m: Tensor, from_R: Tensor, counts_R: Tensor, k: Stored, steps_m: Tensor
) -> tuple[Stored, Tensor]:
    """Keys as they came, and how far they have moved after these steps.

    Args:
        stays_m: of the known ones.
        from_R: how many of these every lane has; the others have not moved before.
        k: what lies in the pool.
    """
    first_R = counts_R.cumsum(0) - counts_R
    rows_m = torch.cat(
        [first + torch.arange(count) for first, count in zip(first_R.tolist(), from_R.tolist(), strict=True)]
    )
    came = []
    for tensor, known in zip(k, origin.k, strict=True):
        tensor = tensor.clone()
        tensor[rows_m.to(tensor.device)] = known[stays_m.to(known.device)]
        came.append(tensor)
    return tuple(came), steps_m.index_add(0, rows_m, origin.by_m[stays_m])
