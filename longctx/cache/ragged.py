"""RaggedKV: keys and values of one layer, every row and kv head with as many tokens as it kept.

A value: appending gives a new one, the old one stays good, and keeping both is a fork. They share their blocks: who
appends writes behind what all others see, or, where another cache has other tokens there, to a copy of its own.

Legend: B batch, K kv heads, R = B x K lanes, N blocks, C tokens per block, T new tokens, E head dim.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from longctx.cache.codec import Codec
from longctx.cache.compress import kept_tokens
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Pool
from longctx.cache.ranks import Ranks
from longctx.errors import UnsupportedError


class RaggedKV:
    """Rotated keys and values by lane, lanes ordered by row and then kv head.

    Args:
        lengths_R: tokens of every lane on this rank, evicted ones not counted; int64 on the host.
        seen: tokens of every row so far on all ranks, evicted ones counted.
        window: positions that a query sees; older tokens are evicted. None: all.
        settled: tokens that had been seen when some were evicted last.
        queries_BHWE: the last queries, where the compression asks for some.
    """

    __slots__ = (
        "__weakref__", "kv_heads", "lengths_R", "options", "pool", "queries_BHWE", "seen", "settled", "window",
    )  # fmt: skip

    def __init__(
        self, pool: Pool, options: CacheOptions, kv_heads: int, lengths_R: Tensor, seen: int = 0,
        window: int | None = None, settled: int = 0, queries_BHWE: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.options, self.kv_heads, self.window = pool, options, kv_heads, window
        self.lengths_R, self.seen, self.settled, self.queries_BHWE = lengths_R, seen, settled, queries_BHWE
        pool.users.add(self)

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        like: Tensor,
        options: CacheOptions | None = None,
        window: int | None = None,
    ) -> "RaggedKV":
        """No token yet; dtype and device of ``like``."""
        options = options or CacheOptions()
        pool = Pool(batch * kv_heads, options.block, Codec(options.bits, options.group), like.new_empty(head_dim))
        return cls(pool, options, kv_heads, torch.zeros(batch * kv_heads, dtype=torch.int64), window=window)

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
        """With T more tokens in every lane, or the first ``counts_B`` of T; ranks keep each what they own of them.

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
        taken_BT = self.options.owned(position_BT.cpu())
        if counts_B is not None:
            taken_BT &= torch.arange(tokens) < counts_B.cpu()[:, None]
        taken_RT = taken_BT.repeat_interleave(heads, dim=0)
        pool = self._own_pool()
        pool.write(self.lengths_R, taken_RT, k_RTE, v_RTE, position_RT)
        return self._with(pool, self.lengths_R + taken_RT.sum(1), seen=self.seen + tokens)

    def truncated(self, before: int) -> "RaggedKV":
        """Without the tokens from position ``before`` on: the roll-back of a speculation.

        Raises:
            ValueError: tokens before it were evicted for the sake of those behind it.
        """
        if before < self.settled:
            raise ValueError(
                f"the cache evicted tokens when it had seen {self.settled}: it cannot go back to {before}; "
                "go on from the cache of that time"
            )
        held_NC = torch.arange(self.pool.block) < self.pool.counts(self.lengths_R)[:, None]
        stays_NC = held_NC & (self.pool.position_NC.cpu() < before)
        owned = self.pool.owner_N >= 0
        lengths = torch.zeros_like(self.lengths_R)
        lengths.index_add_(0, self.pool.owner_N[owned], stays_NC.sum(1)[owned])
        return self._with(self.pool, lengths, seen=min(before, self.seen))

    def kept(self, kept_R: Sequence[Tensor]) -> "RaggedKV":
        """With these tokens alone (per lane a mask over its tokens in order), in blocks of its own."""
        kept_NC = torch.zeros(self.pool.capacity, self.pool.block, dtype=torch.bool)
        for lane, mask in enumerate(kept_R):
            places = torch.zeros(-(-len(mask) // self.pool.block) * self.pool.block, dtype=torch.bool)
            places[: len(mask)] = mask
            kept_NC[self._blocks_of(lane)] = places.view(-1, self.pool.block)
        pool, lengths = self.pool.compacted(kept_NC)
        return self._with(pool, lengths)

    def parts(self) -> tuple[Any, ...]:
        """Numbers and tensors that :meth:`from_parts` makes the same cache of."""
        pool, options = self.pool.copy(self.lengths_R), self.options
        numbers = (options.block, options.bits, options.group, self.kv_heads, self.seen, self.window, self.settled)
        tensors = (pool.k, pool.v, pool.position_NC, pool.owner_N, pool.ordinal_N, pool.last_R, pool.none_E)
        return *numbers, self.lengths_R, self.queries_BHWE, *tensors

    @classmethod
    def from_parts(cls, parts: tuple[Any, ...], options: CacheOptions) -> "RaggedKV":
        """Stored as those of :meth:`parts` were; compressed from now on as ``options`` say."""
        block, bits, group, kv_heads, seen, window, settled, lengths_R, queries_BHWE, *tensors = parts
        options = replace(options, block=block, bits=bits, group=group)
        pool = Pool(len(lengths_R), block, Codec(bits, group), tensors[-1])
        pool.k, pool.v, pool.position_NC = tensors[0], tensors[1], tensors[2]
        pool.owner_N, pool.ordinal_N, pool.last_R = (t.cpu() for t in tensors[3:6])
        return cls(pool, options, kv_heads, lengths_R.cpu(), seen, window, settled, queries_BHWE)

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

    def attended(self, q_BTHE: Tensor | None) -> "RaggedKV":
        """What stays after the new tokens' queries have seen what the cache holds.

        Args:
            q_BTHE: those queries, rotated; None: there are none of this layer's own.

        Raises:
            UnsupportedError: the compression needs queries.
        """
        compression = self.options.compression
        if compression is None:
            return self._within_window()
        queries_BHWE, wanted = None, compression.scorer.queries
        if wanted:
            if q_BTHE is None:
                raise UnsupportedError(
                    f"{type(compression.scorer).__name__} scores keys by the queries of their layer, and these serve "
                    "many layers; use a scorer of keys alone"
                )
            known = [] if self.queries_BHWE is None else [self.queries_BHWE]
            queries_BHWE = torch.cat([*known, q_BTHE.transpose(1, 2)], dim=2)[:, :, -wanted:]
        cache = self._with(self.pool, self.lengths_R, queries_BHWE=queries_BHWE)
        return cache.compressed() if self.seen - self.settled >= compression.policy.every else cache

    def compressed(self) -> "RaggedKV":
        """Down to what the compression, if there is one, lets stay of the tokens seen so far."""
        compression = self.options.compression
        if compression is None or self.settled == self.seen:
            return self
        ranks = Ranks(self.seen, self.options.ranks, self.options.ledger)
        tokens = [self.lane(lane) for lane in range(len(self.lengths_R))]
        masks = kept_tokens(tokens, self.kv_heads, self.queries_BHWE, compression, ranks)
        if masks is None:
            return self
        cache = self.kept(masks)
        return cache._with(cache.pool, cache.lengths_R, settled=self.seen, queries_BHWE=self.queries_BHWE)

    def _within_window(self) -> "RaggedKV":
        """Without the tokens that no later query sees, once they are a quarter of the window."""
        if self.window is None or self.seen - max(self.settled, self.window) < max(self.window // 4, 1):
            return self
        oldest = self.seen - self.window + 1
        cache = self.kept([self.lane(lane)[2].cpu() >= oldest for lane in range(len(self.lengths_R))])
        return cache._with(cache.pool, cache.lengths_R, settled=self.seen)

    def _with(
        self, pool: Pool, lengths_R: Tensor, *, seen: int | None = None, settled: int | None = None,
        queries_BHWE: Tensor | None = None,
    ) -> "RaggedKV":  # fmt: skip
        return RaggedKV(
            pool, self.options, self.kv_heads, lengths_R, self.seen if seen is None else seen, self.window,
            self.settled if settled is None else settled,
            self.queries_BHWE if queries_BHWE is None else queries_BHWE,
        )  # fmt: skip

    def _own_pool(self) -> Pool:
        """The pool, if nobody else sees what lies behind these tokens."""
        others = (user for user in self.pool.users if user is not self)
        if all(bool((user.lengths_R <= self.lengths_R).all()) for user in others if isinstance(user, RaggedKV)):
            return self.pool
        return self.pool.copy(self.lengths_R)


def all_compressed(state: Any) -> Any:
    """A decode state with every cache in it compressed now: a prompt is over."""
    return tree_map(lambda leaf: leaf.compressed() if isinstance(leaf, RaggedKV) else leaf, state)
