"""RaggedKV: keys and values of one layer, every row and kv head with as many tokens as it kept.

A value: appending gives a new one, the old one stays good, and keeping both is a fork. They share their blocks: who
appends writes behind what all others see, or, where another cache has other tokens there, to a copy of its own.

Legend: B batch, K kv heads, R = B x K lanes, N blocks, C tokens per block, T new tokens, E head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.cache.codec import Codec
from longctx.cache.pool import Pool
from longctx.errors import UnsupportedError

BLOCK = 64
"""Tokens per block."""


class RaggedKV:
    """Rotated keys and values by lane, lanes ordered by row and then kv head.

    Args:
        lengths_R: tokens of every lane, evicted ones not counted; int64 on the host.
    """

    __slots__ = ("__weakref__", "kv_heads", "lengths_R", "pool")

    def __init__(self, pool: Pool, kv_heads: int, lengths_R: Tensor) -> None:
        self.pool, self.kv_heads, self.lengths_R = pool, kv_heads, lengths_R
        pool.users.add(self)

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, like: Tensor, *, block: int = BLOCK, codec: Codec | None = None
    ) -> "RaggedKV":
        """No token yet; dtype and device of ``like``."""
        pool = Pool(batch * kv_heads, block, codec or Codec(), like.new_empty(head_dim))
        return cls(pool, kv_heads, torch.zeros(batch * kv_heads, dtype=torch.int64))

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths_R) // self.kv_heads

    @property
    def blocks(self) -> int:
        """Blocks in use: the sum over lanes of ceil(length / block)."""
        return int((-(-self.lengths_R // self.pool.block)).sum())

    @torch.no_grad()
    def append(self, k_BTKE: Tensor, v_BTKE: Tensor, position_BT: Tensor, counts_B: Tensor | None = None) -> "RaggedKV":
        """With T more tokens in every lane, or the first ``counts_B`` of T.

        Args:
            position_BT: their positions in the sequence, above all those before.

        Raises:
            UnsupportedError: gradients are asked for: a cache is for decoding.
        """
        if k_BTKE.requires_grad or v_BTKE.requires_grad:
            raise UnsupportedError("a cache in blocks takes no gradients; decode under torch.no_grad()")
        batch, tokens, heads, size = k_BTKE.shape
        k_RTE, v_RTE = (x.transpose(1, 2).reshape(batch * heads, tokens, size) for x in (k_BTKE, v_BTKE))
        position_RT = position_BT.repeat_interleave(heads, dim=0)
        counts_R = torch.full((batch * heads,), tokens)
        if counts_B is not None:
            counts_R = counts_B.cpu().repeat_interleave(heads)
        pool = self._own_pool()
        pool.write(self.lengths_R, counts_R, k_RTE, v_RTE, position_RT)
        return RaggedKV(pool, self.kv_heads, self.lengths_R + counts_R)

    def truncated(self, before: int) -> "RaggedKV":
        """Without the tokens from position ``before`` on: the roll-back of a speculation."""
        held_NC = torch.arange(self.pool.block) < self.pool.counts(self.lengths_R)[:, None]
        stays_NC = held_NC & (self.pool.position_NC.cpu() < before)
        owned = self.pool.owner_N >= 0
        lengths = torch.zeros_like(self.lengths_R)
        lengths.index_add_(0, self.pool.owner_N[owned], stays_NC.sum(1)[owned])
        return RaggedKV(self.pool, self.kv_heads, lengths)

    def kept(self, kept_R: Sequence[Tensor]) -> "RaggedKV":
        """With these tokens alone (per lane a mask over its tokens in order), in blocks of its own."""
        kept_NC = torch.zeros(self.pool.capacity, self.pool.block, dtype=torch.bool)
        for lane, mask in enumerate(kept_R):
            places = torch.zeros(-(-len(mask) // self.pool.block) * self.pool.block, dtype=torch.bool)
            places[: len(mask)] = mask
            kept_NC[self._blocks_of(lane)] = places.view(-1, self.pool.block)
        pool, lengths = self.pool.compacted(kept_NC)
        return RaggedKV(pool, self.kv_heads, lengths)

    def lane(self, lane: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, E], values [n, E] and positions [n] of one lane, copied together."""
        ids, length = self._blocks_of(lane).to(self.pool.device), int(self.lengths_R[lane])
        k, v = (
            self.pool.codec.decode(tuple(t[ids] for t in stored)).flatten(0, 1)[:length]
            for stored in (self.pool.k, self.pool.v)
        )
        return k, v, self.pool.position_NC[ids].flatten()[:length].long()

    def _blocks_of(self, lane: int) -> Tensor:
        """Ids of the blocks of a lane, in order."""
        ids = (self.pool.owner_N == lane).nonzero()[:, 0]
        ids = ids[self.pool.ordinal_N[ids] * self.pool.block < self.lengths_R[lane]]
        return ids[self.pool.ordinal_N[ids].argsort()]

    def _own_pool(self) -> Pool:
        """The pool, if nobody else sees what lies behind these tokens."""
        others = (user for user in self.pool.users if user is not self)
        if all(bool((user.lengths_R <= self.lengths_R).all()) for user in others if isinstance(user, RaggedKV)):
            return self.pool
        return self.pool.copy(self.lengths_R)
