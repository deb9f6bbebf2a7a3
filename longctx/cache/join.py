"""Caches of several batches as one, and some rows of one: rows of different lengths decode together.

Legend: N blocks, n of them, R lanes (rows x kv heads), T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.cache.layout import BlockLayout
from longctx.cache.ragged import RaggedKV
from longctx.errors import UnsupportedError


def joined(caches: Sequence[RaggedKV]) -> RaggedKV:
    """The rows of all caches, one cache after the other, in a pool of their own.

    Raises:
        UnsupportedError: they are compressed: budgets follow from how much one batch has seen.
    """
    first, seen = caches[0], max(cache.seen for cache in caches)
    if first.options.compression is not None:
        raise UnsupportedError("compressed caches of different lengths cannot be joined; run the prompts apart")
    # Layers in step ask with the same layouts, and share what they get.
    others = tuple(cache.layout for cache in caches[1:])
    layout = first.layout.once(("joined", others), lambda: _joined_layout([first.layout, *others]))
    pool, blocks = first.pool.fresh(), 0
    pool.reserve(layout)
    for cache in caches:
        pool.absorb(cache.pool, (cache.layout.held,), (cache.layout.held + blocks,))
        blocks += cache.layout.capacity
    short = tuple(seen - cache.seen + s for cache in caches for s in cache.short or (0,) * cache.batch)
    settled = min(cache.settled + seen - cache.seen for cache in caches)
    uneven = short if any(short) else ()
    return RaggedKV(
        pool, first.options, first.kv_heads, layout, seen, first.window, settled, rotation=first.rotation, short=uneven
    )  # fmt: skip


def _joined_layout(layouts: Sequence[BlockLayout]) -> BlockLayout:
    lanes, blocks = 0, 0
    owners, lasts = [], []
    for layout in layouts:
        owners.append(torch.where(layout.owner_N >= 0, layout.owner_N + lanes, -1))
        lasts.append(torch.where(layout.last_R >= 0, layout.last_R + blocks, -1))
        lanes, blocks = lanes + layout.lanes, blocks + layout.capacity
    lengths_R = torch.cat([layout.lengths_R for layout in layouts])
    ordinal_N = torch.cat([layout.ordinal_N for layout in layouts])
    return BlockLayout(layouts[0].block, lengths_R, torch.cat(owners), ordinal_N, torch.cat(lasts))


def picked(cache: RaggedKV, rows: Sequence[int]) -> RaggedKV:
    """Some rows, in this order, in a pool of their own; one that comes twice, as of a beam, is there twice."""
    heads, layout = cache.kv_heads, cache.layout
    lanes = [row * heads + head for row in rows for head in range(heads)]
    chosen, from_n, to_n = layout.once(("lanes", tuple(lanes)), lambda: _chosen_lanes(layout, lanes))
    pool = cache.pool.fresh()
    pool.reserve(chosen)
    pool.absorb(cache.pool, (from_n,), (to_n,))
    short = tuple(cache.short[row] for row in rows) if cache.short else ()
    queries = None if cache.queries_BHWE is None else cache.queries_BHWE[list(rows)]
    origin = None if cache.origin is None else cache.origin.of(lanes)
    return RaggedKV(
        pool, cache.options, heads, chosen, cache.seen, cache.window, cache.settled, queries, cache.rotation, origin,
        short, defers=cache.defers, since=cache.since,
    )  # fmt: skip


def _chosen_lanes(layout: BlockLayout, lanes: Sequence[int]) -> tuple[BlockLayout, Tensor, Tensor]:
    """A layout of these lanes, in as few blocks as they need; which blocks come to it, and where."""
    longest = int(layout.lengths_R.max())
    taken_RT = torch.arange(longest) < layout.lengths_R[list(lanes), None]
    chosen, _ = BlockLayout.empty(len(lanes), layout.block).append(taken_RT)
    none = torch.zeros(0, dtype=torch.int64)
    from_n = torch.cat([none, *(layout.blocks_of(lane) for lane in lanes)])
    return chosen, from_n, torch.cat([none, *map(chosen.blocks_of, range(len(lanes)))])
