"""Caches of several batches as one, and some rows of one: rows of different lengths decode together.

Legend: N blocks, C tokens per block, R lanes (rows x kv heads).
"""

from collections.abc import Sequence

import torch

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
    """Some rows, in ascending order; the blocks of the others are freed."""
    heads, layout = cache.kv_heads, cache.layout
    lanes = [row * heads + head for row in rows for head in range(heads)]
    stays_R = torch.zeros(layout.lanes, dtype=torch.bool)
    stays_R[lanes] = True
    held_NC = torch.arange(layout.block) < layout.counts()[:, None]
    pool, compact = cache.pool.compacted(layout, held_NC & stays_R[layout.owner_N.clamp_min(0)][:, None])
    fewer = compact.once(("lanes", tuple(lanes)), lambda: _picked_layout(compact, lanes))
    short = tuple(cache.short[row] for row in rows) if cache.short else ()
    queries = None if cache.queries_BHWE is None else cache.queries_BHWE[list(rows)]
    origin = None if cache.origin is None else cache.origin.of(lanes)
    return RaggedKV(
        pool, cache.options, heads, fewer, cache.seen, cache.window, cache.settled, queries, cache.rotation, origin,
        short, defers=cache.defers, since=cache.since,
    )  # fmt: skip


def _picked_layout(layout: BlockLayout, lanes: Sequence[int]) -> BlockLayout:
    new_R = torch.full((layout.lanes,), -1)
    new_R[lanes] = torch.arange(len(lanes))
    owner_N = torch.where(layout.owner_N >= 0, new_R[layout.owner_N.clamp_min(0)], -1)
    return BlockLayout(layout.block, layout.lengths_R[lanes], owner_N, layout.ordinal_N, layout.last_R[lanes])
