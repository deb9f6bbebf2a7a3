"""A pool in two memories: each lane's newest blocks on the device that attends, full ones behind them on the host.

The device has room for no more than what is new of every lane. Older blocks are read from where they lie, in parts of
at most :data:`longctx.cache.pool.PART` bytes, one after the other; a scorer of a compression sees one row of a layer at
a time. They come back when a cache is cut so far that they are new again.

Legend: N blocks, S slots of a storage, C tokens per block, R lanes, E head dim; n blocks of any kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from longctx.cache.codec import Codec
from longctx.cache.layout import SPARE, BlockLayout
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Found, Held, Pool


class Moves(NamedTuple):
    """Slots whose content goes from the device to the host and back, and where to."""

    down_from: Tensor
    down_to: Tensor
    up_from: Tensor
    up_to: Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """Where blocks lie. A value, which layers in step share.

    Args:
        hot_N, cold_N: slot on the device and on the host; -1: not there.
        hot, cold: how many slots there are.
    """

    hot_N: Tensor
    cold_N: Tensor
    hot: int = 0
    cold: int = 0

    def after(self, layout: BlockLayout, newest: int) -> tuple["Slots", Moves]:
        """With the blocks of a layout alone, those on the device that are not full or hold one of the newest tokens."""
        room = max(len(self.hot_N), layout.capacity)
        old_hot_N, old_cold_N = (_longer(slot_N, room) for slot_N in (self.hot_N, self.cold_N))
        owned_N, behind_N = layout.owner_N >= 0, layout.behind()
        is_hot_N, is_cold_N = (
            functional.pad(owned_N & is_one, (0, room - layout.capacity), value=False)
            for is_one in (behind_N < newest, behind_N >= newest)
        )
        hot_N, hot = _placed(old_hot_N, is_hot_N, self.hot)
        cold_N, cold = _placed(old_cold_N, is_cold_N, self.cold)
        down_n, up_n = (old_hot_N >= 0) & (cold_N >= 0), (old_cold_N >= 0) & (hot_N >= 0)
        return Slots(hot_N, cold_N, hot, cold), Moves(old_hot_N[down_n], cold_N[down_n], old_cold_N[up_n], hot_N[up_n])


_NOWHERE = Slots(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


class TieredPool(Pool):
    """See the top of this file; its own tensors are empty.

    Args:
        newest: tokens of every lane whose blocks stay on the device.
    """

    def __init__(self, block: int, codec: Codec, none_E: Tensor, worth: bool, newest: int) -> None:
        super().__init__(block, codec, none_E, worth)
        self.newest, self.slots = newest, _NOWHERE
        self.hot = Pool(block, codec, none_E, worth)
        self.cold = Pool(block, codec, none_E.cpu(), worth, pinned=none_E.device.type == "cuda")
        self.step = self.cold.step = self.part

    @property
    def capacity(self) -> int:
        """See :class:`Pool`."""
        return self.hot.capacity + self.cold.capacity

    @property
    def device_nbytes(self) -> int:
        """See :class:`Pool`; what is read of the host comes on top for a moment."""
        return self.hot.device_nbytes

    @property
    def host_nbytes(self) -> int:
        """See :class:`Pool`."""
        return self.cold.device_nbytes

    @property
    def lane_device(self) -> torch.device:
        """See :class:`Pool`."""
        return self.cold.device

    def fresh(self) -> "TieredPool":
        """See :class:`Pool`."""
        return TieredPool(self.block, self.codec, self.none_E, self.worth_NC is not None, self.newest)

    def reserve(self, layout: BlockLayout) -> None:
        """See :class:`Pool`; blocks that are no longer new go to the host, and those that are new again come back.

        Args:
            layout: the longest of all that the users of this pool have; blocks of none of them are free.
        """
        old = self.slots
        new, moves = layout.once(("slots", old, self.newest), lambda: old.after(layout, self.newest))
        self.hot.resize(new.hot)
        self.cold.resize(new.cold)
        # A slot may be left by one block and taken by another, so all are read first.
        # What goes down is waited for, so that no slot of the host is written while the device still reads it.
        down = self.hot.lifted((moves.down_from,)) if len(moves.down_from) else None
        up = self.cold.lifted((moves.up_from,)) if len(moves.up_from) else None
        if down is not None:
            self.cold.lay((moves.down_to,), down)
        if up is not None:
            self.hot.lay((moves.up_to,), up)
        self.slots = new

    def found(self, block_n: Tensor) -> Sequence[Found]:
        """See :class:`Pool`; blocks that are nowhere are left out."""
        found = []
        for store, slot_N in ((self.hot, self.slots.hot_N), (self.cold, self.slots.cold_N)):
            slot_n = slot_N[block_n]
            some = (slot_n >= 0).nonzero()[:, 0]
            if len(some):
                found.append(Found(store, some, slot_n[some]))
        return found

    def held(self, layout: BlockLayout) -> Sequence[Held]:
        """See :class:`Pool`."""
        slots = self.slots

        def find() -> tuple[BlockLayout, BlockLayout]:
            return _within(layout, slots.hot_N, slots.hot), _within(layout, slots.cold_N, slots.cold)

        hot, cold = layout.once(("tiers", slots), find)
        return [Held(self.hot, hot), Held(self.cold, cold)] if slots.cold else [Held(self.hot, hot)]

    def copy(self, layout: BlockLayout) -> "TieredPool":
        """See :class:`Pool`."""
        other, ids = self.fresh(), layout.held
        other.reserve(layout)
        other.absorb(self, (ids,), (ids,))
        return other

    def plain(self, layout: BlockLayout) -> Pool:
        """See :class:`Pool`; on the host."""
        other, ids = Pool(self.block, self.codec, self.cold.none_E, self.worth_NC is not None), layout.held
        other.reserve(layout)
        other.absorb(self, (ids,), (ids,))
        return other


def empty_pool(options: CacheOptions, codec: Codec, none_E: Tensor) -> Pool:
    """Storage as a cache of these options needs it."""
    worth = options.branch is not None
    if options.offload is None:
        return Pool(options.block, codec, none_E, worth)
    return TieredPool(options.block, codec, none_E, worth, options.offload)


def _longer(slot_N: Tensor, room: int) -> Tensor:
    return functional.pad(slot_N, (0, room - len(slot_N)), value=-1)


def _placed(slot_N: Tensor, wanted_N: Tensor, slots: int) -> tuple[Tensor, int]:
    """Slots of the wanted blocks, theirs where they have one, and how many slots there are then."""
    slot_N = torch.where(wanted_N, slot_N, -1)
    lacking, taken_S = (wanted_N & (slot_N < 0)).nonzero()[:, 0], torch.zeros(slots, dtype=torch.bool)
    taken_S[slot_N[slot_N >= 0]] = True
    free = (~taken_S).nonzero()[:, 0]
    more = 0 if len(free) >= len(lacking) else max(len(lacking) - len(free), slots // SPARE)
    slot_N[lacking] = torch.cat((free, torch.arange(slots, slots + more)))[: len(lacking)]
    return slot_N, slots + more


def _within(layout: BlockLayout, slot_N: Tensor, slots: int) -> BlockLayout:
    """What a layout says of the blocks in a storage, by slot; others than its own are free."""
    ids = layout.held
    ids = ids[slot_N[ids] >= 0]
    owner_S, ordinal_S = torch.full((slots,), -1), torch.zeros(slots, dtype=torch.int64)
    owner_S[slot_N[ids]], ordinal_S[slot_N[ids]] = layout.owner_N[ids], layout.ordinal_N[ids]
    last_R = torch.where(layout.last_R >= 0, slot_N[layout.last_R.clamp_min(0)], -1) if len(slot_N) else layout.last_R
    return BlockLayout(layout.block, layout.lengths_R, owner_S, ordinal_S, last_R)
