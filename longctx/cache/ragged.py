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
from longctx.cache.layout import BlockLayout
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Pool
from longctx.cache.ranks import Ranks
from longctx.errors import UnsupportedError


class RaggedKV:
    """Rotated keys and values by lane, lanes ordered by row and then kv head.

    Args:
        layout: of the tokens of every lane on this rank, evicted ones not counted.
        seen: tokens of every row so far on all ranks, evicted ones counted.
        window: positions that a query sees; older tokens are evicted. None: all.
        settled: tokens that had been seen when some were evicted last.
        queries_BHWE: the last queries, where the compression asks for some.
        index: what the search keeps beside the tokens.
    """

    __slots__ = (
        "__weakref__", "index", "kv_heads", "layout", "options", "pool", "queries_BHWE", "seen", "settled", "window",
    )  # fmt: skip

    def __init__(
        self, pool: Pool, options: CacheOptions, kv_heads: int, layout: BlockLayout, seen: int = 0,
        window: int | None = None, settled: int = 0, queries_BHWE: Tensor | None = None, index: Any = None,
    ) -> None:  # fmt: skip
        self.pool, self.options, self.kv_heads, self.window = pool, options, kv_heads, window
        self.layout, self.seen, self.settled, self.queries_BHWE = layout, seen, settled, queries_BHWE
        self.index = index
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
        pool = Pool(options.block, Codec(options.bits, options.group), like.new_empty(head_dim))
        return cls(pool, options, kv_heads, options.start(batch * kv_heads), window=window)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths_R) // self.kv_heads

    @property
    def blocks(self) -> int:
        """Blocks in use: the sum over lanes of ceil(length / block)."""
        return self.layout.used

    @property
    def lengths_R(self) -> Tensor:
        """Tokens of every lane on this rank; int64 on the host."""
        return self.layout.lengths_R

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
        if self.options.search is not None:
            k_BTKE = self.options.search.keys(k_BTKE)
        batch, tokens, heads, size = k_BTKE.shape
        k_RTE, v_RTE = (x.transpose(1, 2).reshape(batch * heads, tokens, size) for x in (k_BTKE, v_BTKE))
        position_RT = position_BT.repeat_interleave(heads, dim=0)
        taken_BT = self.options.owned(position_BT)
        if counts_B is not None:
            taken_BT &= torch.arange(tokens) < counts_B.cpu()[:, None]
        taken_RT = taken_BT.repeat_interleave(heads, dim=0)
        pool, (layout, places) = self._own_pool(), self.layout.append(taken_RT)
        pool.write(places, layout.capacity, k_RTE, v_RTE, position_RT)
        return self._with(pool, layout, seen=self.seen + tokens)

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
        layout = self.layout
        held_NC = torch.arange(layout.block) < layout.counts()[:, None]
        stays_NC = held_NC & (self.pool.position_NC[: layout.capacity].cpu() < before)
        lengths_R = torch.zeros_like(self.lengths_R)
        lengths_R.index_add_(0, layout.owner_N.clamp_min(0), stays_NC.sum(1))
        cache, search = self._with(self.pool, layout.cut(lengths_R), seen=min(before, self.seen)), self.options.search
        if search is not None:
            cache.index = search.cut(self.index, before)
        return cache

    def kept(self, kept_R: Sequence[Tensor]) -> "RaggedKV":
        """With these tokens alone (per lane a mask over its tokens in order), in blocks of its own."""
        kept_NC = torch.zeros(self.layout.capacity, self.layout.block, dtype=torch.bool)
        for lane, mask in enumerate(kept_R):
            ids = self.layout.blocks_of(lane)
            places = torch.zeros(len(ids) * self.layout.block, dtype=torch.bool)
            places[: len(mask)] = mask
            kept_NC[ids] = places.view(-1, self.layout.block)
        return self._with(*self.pool.compacted(self.layout, kept_NC))

    def parts(self) -> tuple[Any, ...]:
        """Numbers and tensors that :meth:`from_parts` makes the same cache of."""
        layout, options = self.layout, self.options
        pool = self.pool.copy(layout.capacity)
        numbers = (options.block, options.bits, options.group, self.kv_heads, self.seen, self.window, self.settled)
        places = (layout.lengths_R, layout.owner_N, layout.ordinal_N, layout.last_R)
        return *numbers, places, self.queries_BHWE, pool.k, pool.v, pool.position_NC, pool.none_E

    @classmethod
    def from_parts(cls, parts: tuple[Any, ...], options: CacheOptions) -> "RaggedKV":
        """Stored as those of :meth:`parts` were; compressed from now on as ``options`` say."""
        block, bits, group, kv_heads, seen, window, settled, places, queries_BHWE, k, v, position_NC, none_E = parts
        options = replace(options, block=block, bits=bits, group=group)
        pool = Pool(block, Codec(bits, group), none_E)
        pool.k, pool.v, pool.position_NC = k, v, position_NC
        layout = BlockLayout(block, *(t.cpu() for t in places))
        return cls(pool, options, kv_heads, layout, seen, window, settled, queries_BHWE)

    def lane(self, lane: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, E], values [n, E] and positions [n] of one lane, copied together."""
        ids, length = self.layout.blocks_of(lane).to(self.pool.device), int(self.lengths_R[lane])
        k, v = (
            self.pool.codec.decode(tuple(t[ids] for t in stored)).flatten(0, 1)[:length]
            for stored in (self.pool.k, self.pool.v)
        )
        return k, v, self.pool.position_NC[ids].flatten()[:length].long()

    def attended(self, q_BTHE: Tensor | None) -> "RaggedKV":
        """What stays after the new tokens' queries have seen what the cache holds.

        Args:
            q_BTHE: those queries, rotated; None: there are none of this layer's own.

        Raises:
            UnsupportedError: the compression needs queries.
        """
        compression = self.options.compression
        if compression is None:
            cache = self._within_window()
            if self.options.search is not None:
                cache = cache._with(cache.pool, cache.layout)
                cache.index = self.options.search.indexed(cache)
            return cache
        queries_BHWE, wanted = None, compression.scorer.queries
        if wanted:
            if q_BTHE is None:
                raise UnsupportedError(
                    f"{type(compression.scorer).__name__} scores keys by the queries of their layer, and these serve "
                    "many layers; use a scorer of keys alone"
                )
            known = [] if self.queries_BHWE is None else [self.queries_BHWE]
            queries_BHWE = torch.cat([*known, q_BTHE.transpose(1, 2)], dim=2)[:, :, -wanted:]
        cache = self._with(self.pool, self.layout, queries_BHWE=queries_BHWE)
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
        return cache._with(cache.pool, cache.layout, settled=self.seen, queries_BHWE=self.queries_BHWE)

    def _within_window(self) -> "RaggedKV":
        """Without the tokens that no later query sees, once they are a quarter of the window."""
        if self.window is None or self.seen - max(self.settled, self.window) < max(self.window // 4, 1):
            return self
        oldest = self.seen - self.window + 1
        cache = self.kept([self.lane(lane)[2].cpu() >= oldest for lane in range(len(self.lengths_R))])
        return cache._with(cache.pool, cache.layout, settled=self.seen)

    def _with(
        self, pool: Pool, layout: BlockLayout, *, seen: int | None = None, settled: int | None = None,
        queries_BHWE: Tensor | None = None,
    ) -> "RaggedKV":  # fmt: skip
        return RaggedKV(
            pool, self.options, self.kv_heads, layout, self.seen if seen is None else seen, self.window,
            self.settled if settled is None else settled,
            self.queries_BHWE if queries_BHWE is None else queries_BHWE, self.index,
        )  # fmt: skip

    def _own_pool(self) -> Pool:
        """The pool, if nobody else sees what lies behind these tokens."""
        others = (user for user in self.pool.users if user is not self)
        if all(bool((user.lengths_R <= self.lengths_R).all()) for user in others if isinstance(user, RaggedKV)):
            return self.pool
        return self.pool.copy(self.layout.capacity)


def all_compressed(state: Any) -> Any:
    """A decode state with every cache in it compressed now: a prompt is over."""
    return tree_map(lambda leaf: leaf.compressed() if isinstance(leaf, RaggedKV) else leaf, state)
