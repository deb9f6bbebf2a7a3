"""A cache as numbers and tensors, and the same cache made of these: on as many ranks, or its tokens dealt anew.

Legend: B batch, K kv heads, R = B x K lanes, N blocks, C tokens per block, E head dim; n tokens of one lane, m of all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longctx.cache.codec import Codec
from longctx.cache.layout import BlockLayout
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Pool
from longctx.cache.ragged import RaggedKV
from longctx.cache.rotation import Origin, Rotation
from longctx.cache.search import lane_positions
from longctx.cache.tiers import empty_pool
from longctx.errors import UnsupportedError


def parts_of(cache: RaggedKV) -> tuple[Any, ...]:
    """Numbers, which are the same on all ranks, and tensors of this one, that :func:`restored` makes the cache of."""
    layout, options = cache.layout, cache.options
    pool = cache.pool.plain(layout)
    numbers = (options.block, options.bits, options.group, cache.kv_heads, cache.seen, cache.window, cache.settled)
    places = (layout.lengths_R, layout.owner_N, layout.ordinal_N, layout.last_R)
    moves = None if options.compression is None else options.moves
    frequencies_F = None if cache.rotation is None else cache.rotation.frequencies_F
    origin = None if cache.origin is None else tuple(cache.origin)
    stored = (cache.queries_BHWE, pool.k, pool.v, pool.position_NC, pool.none_E)
    return *numbers, places, *stored, frequencies_F, moves, pool.worth_NC, origin, cache.since, cache.short


def restored(parts: tuple[Any, ...], options: CacheOptions, device: torch.device) -> RaggedKV:
    """Stored as those of :func:`parts_of` were; compressed and offloaded from now on as ``options`` say.

    Args:
        device: of the model; parts may be elsewhere.

    Raises:
        UnsupportedError: they count positions otherwise than tokens were evicted by.
    """
    return _placed(_plain(parts, options), device)


def dealt(parts: Iterable[tuple[Any, ...]], options: CacheOptions, device: torch.device) -> RaggedKV:
    """The tokens that this rank owns of a cache whose tokens are spread over ``parts``; one part is held at a time.

    Args:
        parts: of every rank that had a part of the cache, on the host.

    Raises:
        UnsupportedError: see :func:`restored`.
    """
    first, found = None, []
    for own in parts:
        cache = _plain(own, options)
        first = first or cache._with(cache.pool.fresh(), BlockLayout.empty(cache.layout.lanes, cache.layout.block))
        found.append(_owned(cache))
    if first is None:
        raise ValueError("a cache of no parts")
    lengths_R = torch.stack([share.cache.lengths_R for share in found]).sum(0)
    layout, _ = first.layout.append(torch.arange(int(lengths_R.max())) < lengths_R[:, None])
    pool, at, order = first.pool, layout.first_places(lengths_R), _order(found)
    pool.reserve(layout)
    for share, to_m in zip(found, order, strict=True):
        source = share.cache.layout.first_places(share.cache.lengths_R)
        pool.absorb(share.cache.pool, source, tuple(index[to_m] for index in at))
    origin = _origin(pool, at, lengths_R, found, order)
    return _placed(first._with(pool, layout, origin=origin), device)


class _Share(NamedTuple):
    """What this rank owns of one part: a cache, positions of every lane, and keys that have moved."""

    cache: RaggedKV
    positions: list[Tensor]
    origin: Origin | None


def _owned(cache: RaggedKV) -> _Share:
    positions = [lane_positions(cache, lane).cpu() for lane in range(cache.layout.lanes)]
    masks = [cache.options.owned(position_n) for position_n in positions]
    stay = [position_n[mask_n] for position_n, mask_n in zip(positions, masks, strict=True)]
    return _Share(cache.kept(masks), stay, None if cache.origin is None else cache.origin.kept(masks))


def _order(shares: Sequence[_Share]) -> list[Tensor]:
    """Where the tokens [m] of every share come among those of all: lane by lane, by position."""
    places: list[list[Tensor]] = [[] for _ in shares]
    before = 0
    for lane in zip(*(share.positions for share in shares), strict=True):
        rank_n = torch.cat(lane).argsort(stable=True).argsort() + before
        before += len(rank_n)
        for own, part in zip(places, torch.split(rank_n, [len(position_n) for position_n in lane]), strict=True):
            own.append(part)
    return [torch.cat(own) for own in places]


def _origin(
    pool: Pool, at: tuple[Tensor, Tensor], lengths_R: Tensor, shares: Sequence[_Share], order: Sequence[Tensor]
) -> Origin | None:
    """Keys as they came, of the first tokens of every lane up to the last that has moved."""
    origins = [share.origin for share in shares if share.origin is not None]
    if len(origins) < len(shares):
        return None
    by_m, k = torch.zeros(len(at[0]), dtype=torch.int64), tuple(t[at] for t in pool.k)
    for share, origin, to_m in zip(shares, origins, order, strict=True):
        moved_m = to_m[_first_rows(share.cache.lengths_R, origin.counts_R)]
        by_m[moved_m] = origin.by_m
        for tensor, known in zip(k, origin.k, strict=True):
            tensor[moved_m] = known
    # Who stands further ahead has moved further: in every lane those that have moved are the first.
    counts_R = torch.stack([(by_n > 0).sum() for by_n in torch.split(by_m, lengths_R.tolist())])
    rows_m = _first_rows(lengths_R, counts_R)
    return Origin(tuple(t[rows_m] for t in k), by_m[rows_m], counts_R)


def _first_rows(lengths_R: Tensor, counts_R: Tensor) -> Tensor:
    """Which of the tokens of all lanes are among the first so many of their lane."""
    first_R = lengths_R.cumsum(0) - lengths_R
    pairs = zip(first_R.tolist(), counts_R.tolist(), strict=True)
    return torch.cat([first + torch.arange(count) for first, count in pairs])


def _plain(parts: tuple[Any, ...], options: CacheOptions) -> RaggedKV:
    """The cache where its parts are, in one storage."""
    block, bits, group, kv_heads, seen, window, settled, places, queries_BHWE, *stored = parts
    k, v, position_NC, none_E, frequencies_F, moves, worth_NC, origin, since, short = stored
    rotation = None if frequencies_F is None else Rotation(frequencies_F.cpu())
    options = replace(options, block=block, bits=bits, group=group).bound(rotation)
    if since and None not in (moves, options.compression) and moves != options.moves:
        counted = "cache" if moves else "text"
        raise UnsupportedError(f"this cache evicted tokens with positions {counted!r} of its policy; go on with these")
    if origin is not None:
        origin = Origin(origin[0], *(t.cpu() for t in origin[1:]))
    pool = Pool(block, Codec(bits, group), none_E)
    pool.k, pool.v, pool.position_NC = k, v, position_NC
    if options.branch is not None:
        pool.worth_NC = torch.full(position_NC.shape, torch.nan) if worth_NC is None else worth_NC
        pool.worth_NC = pool.worth_NC.to(pool.device)
    layout = BlockLayout(block, *(t.cpu() for t in places))
    return RaggedKV(
        pool, options, kv_heads, layout, seen, window, settled, queries_BHWE, rotation, origin, short, since=since
    )  # fmt: skip


def _placed(cache: RaggedKV, device: torch.device) -> RaggedKV:
    """The same where a model needs it, newest tokens apart from older ones where these are offloaded."""
    plain, options, layout = cache.pool, cache.options, cache.layout
    if options.offload is None and plain.device == device:
        return cache
    pool = empty_pool(options, plain.codec, plain.none_E.to(device))
    pool.reserve(layout)
    pool.absorb(plain, (layout.held,), (layout.held,))
    queries_BHWE = None if cache.queries_BHWE is None else cache.queries_BHWE.to(device)
    origin = cache.origin
    if origin is not None:
        origin = origin._replace(k=tuple(t.to(device) for t in origin.k))
    return cache._with(pool, layout, queries_BHWE=queries_BHWE, origin=origin)
