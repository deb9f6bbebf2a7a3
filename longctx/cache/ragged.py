"""RaggedKV: keys and values of one layer, every row and kv head with as many tokens as it kept.

A value: appending gives a new one, the old one stays good, and keeping both is a fork. They share their blocks: who
appends writes behind what all others see, or, where another cache has other tokens there, to a copy of its own.

Legend: B batch, K kv heads, R = B x K lanes, N blocks, C tokens per block, T new tokens, E head dim.
"""

import math
from collections.abc import Iterator, Sequence
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
from longctx.cache.rotation import Origin, Rotation, close_gaps, evicted_behind
from longctx.cache.search import lane_positions
from longctx.cache.tiers import empty_pool
from longctx.errors import UnsupportedError


class RaggedKV:
    """Rotated keys and values by lane, lanes ordered by row and then kv head.

    Args:
        layout: of the tokens of every lane on this rank, evicted ones not counted.
        seen: tokens of every row so far on all ranks, evicted ones counted.
        window: positions that a query sees; older tokens are evicted. None: all.
        settled: tokens that had been seen when some were evicted last.
        queries_BHWE: the last queries, where the compression asks for some.
        rotation: of the keys; None: not known, or it depends on the length.
        origin: of keys that have moved, where they are rounded.
        short: tokens by which each row has seen fewer than ``seen``; empty: none (see SequenceContext).
        index: what the search keeps beside the tokens.
        defers: see :meth:`deferring`.
        since: tokens that had been seen when the policy evicted some last, which it counts from.
    """

    __slots__ = (
        "__weakref__", "defers", "index", "kv_heads", "layout", "options", "origin", "pool", "queries_BHWE", "rotation",
        "seen", "settled", "short", "since", "window",
    )  # fmt: skip

    def __init__(
        self, pool: Pool, options: CacheOptions, kv_heads: int, layout: BlockLayout, seen: int = 0,
        window: int | None = None, settled: int = 0, queries_BHWE: Tensor | None = None,
        rotation: Rotation | None = None, origin: Origin | None = None, short: tuple[int, ...] = (), index: Any = None,
        defers: bool = False, since: int = 0,
    ) -> None:  # fmt: skip
        self.pool, self.options, self.kv_heads, self.window, self.short = pool, options, kv_heads, window, short
        self.layout, self.seen, self.settled, self.queries_BHWE = layout, seen, settled, queries_BHWE
        self.rotation, self.origin, self.index, self.defers, self.since = rotation, origin, index, defers, since
        if origin is None and options.moves and pool.rounds:
            self.origin = Origin.empty(pool, layout.lanes)
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
        rotation: Rotation | None = None,
    ) -> "RaggedKV":
        """No token yet; dtype and device of ``like``.

        Raises:
            UnsupportedError: the compression needs a rotation, and there is none.
        """
        options = (options or CacheOptions()).bound(rotation)
        pool = empty_pool(options, Codec(options.bits, options.group), like.new_empty(head_dim))
        return cls(pool, options, kv_heads, options.start(batch * kv_heads), window=window, rotation=rotation)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths_R) // self.kv_heads

    @property
    def blocks(self) -> int:
        """Blocks in use: the sum over lanes of ceil(length / block)."""
        return self.layout.used

    @property
    def branch(self) -> str | None:
        """Part of its decoder layer that must report how much new tokens are worth; None: none."""
        return self.options.branch

    @property
    def lengths_R(self) -> Tensor:
        """Tokens of every lane on this rank; int64 on the host."""
        return self.layout.lengths_R

    @torch.no_grad()
    def append(
        self, k_BTKE: Tensor, v_BTKE: Tensor, position_BT: Tensor, counts_B: Tensor | None = None,
        taken_BTK: Tensor | None = None,
    ) -> "RaggedKV":  # fmt: skip
        """With T more tokens in every lane, or the first ``counts_B`` of T; ranks keep each what they own of them.

        Args:
            position_BT: their positions in the sequence, above all those before; never changed in place.
            taken_BTK: which of them each kv head takes, on the host; None: all.

        Raises:
            UnsupportedError: gradients are asked for: a cache is for decoding.
        """
        if k_BTKE.requires_grad or v_BTKE.requires_grad:
            raise UnsupportedError("a cache in blocks takes no gradients; decode under torch.no_grad()")
        if self.options.search is not None:
            k_BTKE = self.options.search.keys(k_BTKE)
        batch, tokens, heads, size = k_BTKE.shape
        if tokens > 1:
            k_BTKE, v_BTKE = k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        k_mE, v_mE = k_BTKE.reshape(-1, size), v_BTKE.reshape(-1, size)
        if self.options.owns_all and counts_B is None and taken_BTK is None:
            layout = self.layout.extended(tokens)
        else:
            taken_BT = self.options.owned(position_BT)
            if counts_B is not None:
                taken_BT &= torch.arange(tokens) < counts_B.cpu()[:, None]
            taken_RT = taken_BT.repeat_interleave(heads, dim=0)
            if taken_BTK is not None:
                taken_RT = taken_RT & taken_BTK.transpose(1, 2).flatten(0, 1)
            layout, _ = self.layout.append(taken_RT)
        # The same for all layers. What it was made of is kept, or another tensor could have its number.
        _, position_m = layout.once(
            ("positions", id(position_BT), heads), lambda: (position_BT, _by_lane(position_BT, batch, heads))
        )
        pool = self._own_pool()
        pool.write(layout, tokens, k_mE, v_mE, position_m)
        return self._with(pool, layout, seen=self.seen + tokens)

    def valued(self, worth_BT: Tensor) -> "RaggedKV":
        """What stays once the worth of the tokens that were just appended is known."""
        places = self.layout.came
        row_n = (places.lane_n // self.kv_heads).to(worth_BT.device)
        worth_n = worth_BT[row_n, places.token_n.to(worth_BT.device)]
        self.pool.tell(places.block_n, places.offset_n, worth_n)
        return self._due()

    def truncated(self, before: int) -> "RaggedKV":
        """Without the tokens from position ``before`` on: the roll-back of a speculation.

        Raises:
            ValueError: tokens before it were evicted for the sake of those behind it, or queries were let go that a
                scorer would look at again (not where the tokens came while the cache was :meth:`deferring`).
            UnsupportedError: rows differ in length.
        """
        self._check_even("cut back")
        queries_BHWE, back = self.queries_BHWE, max(self.seen - before, 0)
        if before < self.settled:
            raise ValueError(
                f"the cache evicted tokens when it had seen {self.settled}: it cannot go back to {before}; "
                "go on from the cache of that time"
            )
        if queries_BHWE is not None and back:
            if not self.defers:
                raise ValueError(
                    "the cache let queries go that it would need again; make it deferring before tokens that may go"
                )
            queries_BHWE = queries_BHWE[:, :, : max(queries_BHWE.shape[2] - back, 0)]
        layout = self.layout
        if bool((layout.lengths_R == self.seen).all()):  # every token is where it came
            lengths_R = layout.lengths_R.clamp(max=before)
        else:
            # No lane has more tokens behind than were seen since.
            ids = layout.held[layout.behind()[layout.held] < self.seen - before]
            held_nC = torch.arange(layout.block) < layout.counts()[ids][:, None]
            goes_nC = held_nC & (self.pool.positions(ids, torch.device("cpu")) >= before)
            lengths_R = self.lengths_R.index_add(0, layout.owner_N[ids], goes_nC.sum(1), alpha=-1)
        layout, search = layout.cut(lengths_R), self.options.search
        cache = self._with(self.pool, layout, seen=self.seen - back, queries_BHWE=queries_BHWE)
        if search is not None:
            cache.index = search.cut(self.index, before)
        return cache

    def deferring(self) -> "RaggedKV":
        """The same, which from now on evicts nothing and lets no query go, so that what comes can be taken back."""
        cache = self._with(self.pool, self.layout)
        cache.defers = True
        return cache

    def resumed(self) -> "RaggedKV":
        """What stays, once it is known which tokens do that came to a cache that was :meth:`deferring`."""
        queries_BHWE, compression = self.queries_BHWE, self.options.compression
        if queries_BHWE is not None and compression is not None:
            queries_BHWE = queries_BHWE[:, :, -compression.scorer.queries :]
        cache = self._with(self.pool, self.layout, queries_BHWE=queries_BHWE)
        cache.defers = False
        return cache._due()

    def room(self, most: int) -> int:
        """How many of the next tokens, up to ``most``, may come at once: a compression is due behind the last at most.

        Ranks that share the cache ask together.
        """
        compression = self.options.compression
        if compression is None:
            return most
        ranks, policy = Ranks(self.seen, self.options.ranks, self.options.ledger), compression.policy
        longest = int(ranks.total(self.lengths_R).max())
        most_seen = math.inf if self.window is None else self.window - 1
        for new in range(max(policy.every - (self.seen - self.since), 1), most):
            if min(longest + new, most_seen) > policy.budget(self.seen + new, compression.layer):
                return new
        return most

    def kept(self, kept_R: Sequence[Tensor]) -> "RaggedKV":
        """With these tokens alone (per lane a mask over its tokens in order), in blocks of its own."""
        kept_NC = torch.zeros(self.layout.capacity, self.layout.block, dtype=torch.bool)
        for lane, mask in enumerate(kept_R):
            ids = self.layout.blocks_of(lane)
            places = torch.zeros(len(ids) * self.layout.block, dtype=torch.bool)
            places[: len(mask)] = mask
            kept_NC[ids] = places.view(-1, self.layout.block)
        return self._with(*self.pool.compacted(self.layout, kept_NC))

    def lane(self, lane: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, E], values [n, E] and positions [n] of one lane, copied to ``device`` or that of the pool."""
        return self._tokens(self.layout.blocks_of(lane), int(self.lengths_R[lane]), device)

    def lane_in_parts(self, lane: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same, as few at a time as the pool wants; one part at least."""
        ids, length, step = self.layout.blocks_of(lane), int(self.lengths_R[lane]), self.pool.step
        for start in range(0, max(len(ids), 1), step):
            yield self._tokens(ids[start : start + step], length - start * self.layout.block)

    def _tokens(self, ids: Tensor, length: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The first tokens of blocks of one lane."""
        k, v = (rows.flatten(0, 1)[:length] for rows in self.pool.rows(ids, device))
        return k, v, self.pool.positions(ids, device).flatten()[:length].long()

    def attended(self, q_BTHE: Tensor | None) -> "RaggedKV":
        """What stays after the new tokens' queries have seen what the cache holds.

        Args:
            q_BTHE: those queries, rotated; None: there are none of this layer's own.

        Raises:
            UnsupportedError: the compression needs queries.
        """
        compression = self.options.compression
        if compression is None:
            cache = self._due()
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
            queries_BHWE = torch.cat([*known, q_BTHE.transpose(1, 2)], dim=2)
            queries_BHWE = queries_BHWE if self.defers else queries_BHWE[:, :, -wanted:]
        if self.branch is not None:
            if q_BTHE is None:
                raise UnsupportedError(
                    f"{type(compression.scorer).__name__} scores tokens by what their layer does to them, and these "
                    "keys serve many layers; use a scorer of keys alone"
                )
            return self  # for now: the layer has yet to report
        return self._with(self.pool, self.layout, queries_BHWE=queries_BHWE)._due()

    def _due(self) -> "RaggedKV":
        """What stays now."""
        compression = self.options.compression
        if self.defers:
            return self
        enough = compression is not None and self.seen - self.since >= compression.policy.every
        return (self.compressed() if enough else self)._within_window()

    def compressed(self) -> "RaggedKV":
        """Down to what the compression, if there is one, lets stay of the tokens seen so far.

        It chooses among tokens that a later query sees; where it evicts any, those behind the window go, too.
        """
        compression = self.options.compression
        if compression is None or self.since == self.seen:
            return self
        self._check_even("compressed")
        ranks = Ranks(self.seen, self.options.ranks, self.options.ledger)
        tokens, worths = [self.lane(lane, self.pool.lane_device) for lane in range(len(self.lengths_R))], self._worths()
        device, positions = self.pool.device, [position for _, _, position in tokens]
        visible = self._visible(positions)
        if self.window is not None:
            tokens = [(k[n], v[n], p[n]) for (k, v, p), n in zip(tokens, visible, strict=True)]
            worths = None if worths is None else [w[n] for w, n in zip(worths, visible, strict=True)]
        masks = kept_tokens(tokens, self.kv_heads, self.queries_BHWE, compression, ranks, worths, device)
        if masks is None:
            return self
        masks = [n.cpu().masked_scatter(n.cpu(), mask) for n, mask in zip(visible, masks, strict=True)]
        by = evicted_behind(positions, masks, ranks) if self.options.moves else None
        cache = self._of_its_own(masks, by)
        cache.since = self.seen
        return cache

    def _worths(self) -> list[Tensor] | None:
        """Of every lane's tokens, where they are told."""
        if self.pool.worth_NC is None:
            return None
        lanes = [
            self.pool.worths(self.layout.blocks_of(lane)).flatten()[:length]
            for lane, length in enumerate(self.lengths_R.tolist())
        ]
        if bool(torch.cat(lanes).isnan().any()):
            raise UnsupportedError(
                f"no {self.branch} of this layer reported what its tokens are worth: they were cached under another "
                "compression; run them again, or use a scorer of keys alone"
            )
        return lanes

    def _within_window(self) -> "RaggedKV":
        """Without the tokens that no later query sees, once they are a quarter of the window."""
        if self.window is None or self.seen - max(self.settled, self.window) < max(self.window // 4, 1):
            return self
        return self._of_its_own(self._visible([lane_positions(self, lane) for lane in range(len(self.lengths_R))]))

    def _visible(self, positions: Sequence[Tensor]) -> list[Tensor]:
        """Which tokens of every lane a later query sees, as masks.

        Windows are of the text, also where a policy counts positions in the cache.
        """
        if self.window is None:
            return [torch.ones_like(position_n, dtype=torch.bool) for position_n in positions]
        oldest_B = [self.seen - self.window + 1 - short for short in self.short or (0,) * self.batch]
        return [position_n >= oldest_B[lane // self.kv_heads] for lane, position_n in enumerate(positions)]

    def _of_its_own(self, kept_R: Sequence[Tensor], by: Sequence[Tensor] | None = None) -> "RaggedKV":
        """With these tokens alone, which do not go back to more.

        Args:
            by: positions by which each moves forward; None: none moves, as what goes is before all that stays.
        """
        kept_R = [mask_n.cpu() for mask_n in kept_R]
        cache, origin = self.kept(kept_R), self.origin
        if self.rotation is not None and (by is not None or origin is not None):
            by = by or [torch.zeros(int(mask_n.sum()), dtype=torch.int64) for mask_n in kept_R]
            origin = close_gaps(cache.pool, cache.layout, self.rotation, by, kept_R, origin)
        return cache._with(cache.pool, cache.layout, settled=self.seen, origin=origin)

    def _with(
        self, pool: Pool, layout: BlockLayout, *, seen: int | None = None, settled: int | None = None,
        queries_BHWE: Tensor | None = None, origin: Origin | None = None,
    ) -> "RaggedKV":  # fmt: skip
        return RaggedKV(
            pool, self.options, self.kv_heads, layout, self.seen if seen is None else seen, self.window,
            self.settled if settled is None else settled,
            self.queries_BHWE if queries_BHWE is None else queries_BHWE, self.rotation,
            self.origin if origin is None else origin, self.short, self.index, self.defers, self.since,
        )  # fmt: skip

    def _check_even(self, what: str) -> None:
        if self.short:
            raise UnsupportedError(f"a cache whose rows differ in length cannot be {what}; run the rows apart")

    def _own_pool(self) -> Pool:
        """The pool, if nobody else sees what lies behind these tokens."""
        if all(user.layout is self.layout or self.layout.covers(user.layout) for user in self.pool.users):
            return self.pool
        return self.pool.copy(self.layout)


def _by_lane(position_BT: Tensor, batch: int, kv_heads: int) -> Tensor:
    """Positions of the new tokens of all lanes, int32 [R x T]."""
    return position_BT.to(torch.int32)[:, None].expand(batch, kv_heads, position_BT.shape[1]).flatten()


def all_compressed(state: Any) -> Any:
    """A decode state with every cache in it compressed now: a prompt is over."""
    return tree_map(lambda leaf: leaf.compressed() if isinstance(leaf, RaggedKV) else leaf, state)
