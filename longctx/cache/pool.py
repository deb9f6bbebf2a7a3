"""Storage of one layer's keys and values in blocks of equal size; a layout says what lies where.

A pool is one storage, in which block n lies in slot n, or stands for several (:mod:`longctx.cache.tiers`). Who reads or
writes goes by the numbers of blocks, and :meth:`Pool.found` says where these are.

Legend: N blocks, C tokens per block, R lanes, E head dim, T new tokens; n of any, in any order.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from longctx.cache.codec import Codec, Stored
from longctx.cache.layout import BlockLayout

PART = 1 << 26
"""Bytes of keys and values of one layer that are decoded, or come from the host, at a time; one block's at least."""

Part = slice | Tensor
"""Some slots: neighbours, which are read where they lie, or numbers, whose content is copied."""


class Found(NamedTuple):
    """Some of the blocks that were asked for: the storage they lie in, which of all they are, and in which slots."""

    store: "Pool"
    some: Part
    slot_n: Tensor


class Held(NamedTuple):
    """A storage, and a layout of what lies in each of its slots."""

    store: "Pool"
    layout: BlockLayout


class Pool:
    """Keys, values and positions [N, C, ...]; positions ascend along a lane, with gaps where tokens were evicted.

    ``users`` are the caches that share the pool; ``step`` is how many of its blocks may be read at a time.

    Args:
        none_E: a row's size, dtype and device.
        worth: whether a number is kept for each token, NaN until it is told.
        pinned: whether memory of the host is locked, so that a device reads it at full speed.
    """

    def __init__(self, block: int, codec: Codec, none_E: Tensor, worth: bool = False, pinned: bool = False) -> None:
        self.block, self.codec, self.none_E, self.device = block, codec, none_E, none_E.device
        self.k: Stored = codec.encode(none_E.new_empty(0, block, none_E.shape[-1]))
        self.v: Stored = codec.encode(none_E.new_empty(0, block, none_E.shape[-1]))
        self.position_NC = torch.empty(0, block, dtype=torch.int32, device=none_E.device)
        self.worth_NC = torch.empty(0, block, device=none_E.device) if worth else None
        self.users: WeakSet[Any] = WeakSet()
        self.pinned, self.step = pinned, sys.maxsize if codec.bits is None else self.part

    @property
    def part(self) -> int:
        """Blocks that are :data:`PART` bytes as the model has them."""
        return max(1, PART // (2 * self.block * self.none_E.numel() * self.none_E.element_size()))

    @property
    def capacity(self) -> int:
        """Blocks there is room for."""
        return self.position_NC.shape[0]

    @property
    def rounds(self) -> bool:
        """Whether a row that is written and read again comes back noticeably changed."""
        return self.codec.bits is not None or self.none_E.dtype in (torch.bfloat16, torch.float16)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys, values, positions and what is told of tokens."""
        return self.device_nbytes + self.host_nbytes

    @property
    def device_nbytes(self) -> int:
        """Of these, bytes on the device that attends."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    @property
    def host_nbytes(self) -> int:
        """Of these, bytes that were moved away from it."""
        return 0

    @property
    def lane_device(self) -> torch.device:
        """Where there is room for all lanes at once."""
        return self.device

    def fresh(self) -> "Pool":
        """An empty pool of the same kind."""
        return Pool(self.block, self.codec, self.none_E, self.worth_NC is not None)

    def reserve(self, layout: BlockLayout) -> None:
        """Make room for what a layout holds; what lies here stays."""
        self.resize(layout.capacity)

    def resize(self, slots: int) -> None:
        """Have at least so many."""
        if slots <= self.capacity:
            return

        def grown(old: Tensor) -> Tensor:
            # Zeros: what no token has been written to is multiplied by a weight of 0, and must be a number.
            shape = (slots, *old.shape[1:])
            if self.pinned:
                new = torch.zeros(shape, dtype=old.dtype, pin_memory=True)
                new[: len(old)] = old
                return new
            return torch.cat((old, old.new_zeros(slots - len(old), *old.shape[1:])))

        self.k, self.v = tuple(grown(t) for t in self.k), tuple(grown(t) for t in self.v)
        self.position_NC = grown(self.position_NC)
        self.worth_NC = None if self.worth_NC is None else grown(self.worth_NC)

    def found(self, block_n: Tensor) -> Sequence[Found]:
        """Where blocks are; every one of them once."""
        return [Found(self, slice(None), block_n)]

    def held(self, layout: BlockLayout) -> Sequence[Held]:
        """All storages with what a layout says of them, one at least."""
        return [Held(self, layout)]

    def write(self, layout: BlockLayout, tokens: int, k_mE: Tensor, v_mE: Tensor, position_m: Tensor) -> None:
        """Put rows of ``tokens`` per lane to the places where they were appended to a layout last."""
        self.reserve(layout)
        lane_n, token_n, block_n, offset_n = layout.came
        for store, some, slot_n in self.found(block_n):
            k_nE, v_nE, position_n = k_mE, v_mE, position_m
            if slot_n.shape[0] < position_m.shape[0]:  # else all come, in order
                row_n = (lane_n[some] * tokens + token_n[some]).to(k_mE.device)
                k_nE, v_nE, position_n = k_mE[row_n], v_mE[row_n], position_m.to(k_mE.device)[row_n]
            new = (*self.codec.encode(k_nE), *self.codec.encode(v_nE), position_n)
            worth = () if self.worth_NC is None else (torch.full(position_n.shape, torch.nan),)
            store.lay((slot_n, offset_n[some]), (*new, *worth))

    def tell(self, block_n: Tensor, offset_n: Tensor, worth_n: Tensor) -> None:
        """What tokens are worth."""
        for store, some, slot_n in self.found(block_n):
            assert store.worth_NC is not None
            to = (slot_n.to(store.device), offset_n[some].to(store.device))
            store.worth_NC[to] = worth_n[some].to(store.worth_NC)

    def rows(self, block_n: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [n, C, E] of blocks, copied to ``device`` or that of the pool."""
        stored = self._gathered(lambda store: (*store.k, *store.v), block_n, device or self.device)
        return self.codec.decode(stored[: len(self.k)]), self.codec.decode(stored[len(self.k) :])

    def positions(self, block_n: Tensor, device: torch.device | None = None) -> Tensor:
        """Positions [n, C] of blocks."""
        return self._gathered(lambda store: (store.position_NC,), block_n, device or self.device)[0]

    def worths(self, block_n: Tensor) -> Tensor:
        """What was told [n, C] of tokens of blocks."""
        return self._gathered(lambda store: () if store.worth_NC is None else (store.worth_NC,), block_n, self.device)[
            0
        ]

    def read(self, part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values [n, C, E] in some slots; neighbours that are on ``device`` as they are stored are views."""
        k, v = (self.codec.decode(tuple(taken(t, part, device) for t in stored)) for stored in (self.k, self.v))
        return k, v

    def copy(self, layout: BlockLayout) -> "Pool":
        """A pool of its own with what a layout holds."""
        other, blocks = self.fresh(), layout.capacity
        other.k, other.v = (tuple(t[:blocks].clone() for t in tensors) for tensors in (self.k, self.v))
        other.position_NC = self.position_NC[:blocks].clone()
        other.worth_NC = None if self.worth_NC is None else self.worth_NC[:blocks].clone()
        return other

    def plain(self, layout: BlockLayout) -> "Pool":
        """A copy that is one storage."""
        return self.copy(layout)

    def absorb(self, other: "Pool", source: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> None:
        """Copy from places of another pool to places here: blocks, or blocks and offsets in them."""
        for theirs, some, from_n in other.found(source[0]):
            inside = [index[some] for index in source[1:]]
            for mine, among, to_n in self.found(target[0][some]):
                found = theirs.lifted((from_n[among], *(index[among] for index in inside)))
                mine.lay((to_n, *(index[some][among] for index in target[1:])), found)

    def compacted(self, layout: BlockLayout, kept_NC: Tensor) -> tuple["Pool", BlockLayout]:
        """These tokens alone in as few blocks as they need, every lane's in order, and the layout there."""
        order = torch.cat([layout.blocks_of(lane) for lane in range(layout.lanes)])
        row, offset = kept_NC[order].nonzero(as_tuple=True)
        lane = layout.owner_N[order][row]
        lengths_R = torch.bincount(lane, minlength=layout.lanes)
        empty = layout.once("empty", lambda: BlockLayout.empty(layout.lanes, layout.block))
        compact, places = empty.append(torch.arange(int(lengths_R.max())) < lengths_R[:, None])
        other = self.fresh()
        other.reserve(compact)
        other.absorb(self, (order[row], offset), (places.block_n, places.offset_n))
        return other, compact

    def lifted(self, slots: tuple[Tensor, ...]) -> list[Tensor]:
        """Copies of what lies in slots, or in places of slots."""
        at = tuple(index.to(self.device) for index in slots)
        return [t[at] for t in self._tensors()]

    def lay(self, slots: tuple[Tensor, ...], values: Sequence[Tensor]) -> None:
        """Put what :meth:`lifted` gave, from any device."""
        if self.device.type != "cpu" or values[0].device.type != "cpu":  # else all are where they belong
            slots, values = tuple(index.to(self.device) for index in slots), [t.to(self.device) for t in values]
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor.index_put_(slots, value)

    def _tensors(self) -> list[Tensor]:
        told = [] if self.worth_NC is None else [self.worth_NC]
        return [*self.k, *self.v, self.position_NC, *told]

    def _gathered(self, pick: Callable[["Pool"], Stored], block_n: Tensor, device: torch.device) -> Stored:
        found = self.found(block_n)
        if len(found) == 1 and isinstance(found[0].some, slice):
            slot_n = found[0].slot_n.to(found[0].store.device)
            return tuple(t[slot_n].to(device) for t in pick(found[0].store))
        new = tuple(torch.zeros((len(block_n), *t.shape[1:]), dtype=t.dtype, device=device) for t in pick(self))
        for store, some, slot_n in found:
            assert isinstance(some, Tensor)
            at_n, slot_n = some.to(device), slot_n.to(store.device)
            for to, tensor in zip(new, pick(store), strict=True):
                to[at_n] = tensor[slot_n].to(device)
        return new


def taken(tensor: Tensor, part: Part, device: torch.device) -> Tensor:
    """Some slots of a tensor on a device; neighbours that are there are not copied."""
    chosen = tensor[part] if isinstance(part, slice) else tensor[part.to(tensor.device)]
    # To a device the host need not wait; what comes to the host is read at once.
    return chosen if chosen.device == device else chosen.to(device, non_blocking=device.type != "cpu")
