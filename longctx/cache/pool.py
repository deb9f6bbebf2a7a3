"""Storage of one layer's keys and values in blocks of equal size; a layout says what lies where.

Legend: N blocks, C tokens per block, R lanes, E head dim, T new tokens.
"""

from weakref import WeakSet

import torch
from torch import Tensor

from longctx.cache.codec import Codec, Stored
from longctx.cache.layout import BlockLayout, Places


class Pool:
    """Keys, values and positions [N, C, ...]; positions ascend along a lane, with gaps where tokens were evicted.

    ``users`` are the caches that share the pool.

    Args:
        none_E: a row's size, dtype and device.
        worth: whether a number is kept for each token, NaN until it is told.
    """

    def __init__(self, block: int, codec: Codec, none_E: Tensor, worth: bool = False) -> None:
        self.block, self.codec, self.none_E, self.device = block, codec, none_E, none_E.device
        self.k: Stored = codec.encode(none_E.new_empty(0, block, none_E.shape[-1]))
        self.v: Stored = codec.encode(none_E.new_empty(0, block, none_E.shape[-1]))
        self.position_NC = torch.empty(0, block, dtype=torch.int32, device=none_E.device)
        self.worth_NC = torch.empty(0, block, device=none_E.device) if worth else None
        self.users: WeakSet[object] = WeakSet()

    @property
    def capacity(self) -> int:
        """Blocks there is room for."""
        return len(self.position_NC)

    @property
    def rounds(self) -> bool:
        """Whether a row that is written and read again comes back noticeably changed."""
        return self.codec.bits is not None or self.none_E.dtype in (torch.bfloat16, torch.float16)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys, values, positions and what is told of tokens."""
        told = () if self.worth_NC is None else (self.worth_NC,)
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v, self.position_NC, *told))

    def write(self, places: Places, blocks: int, k_RTE: Tensor, v_RTE: Tensor, position_RT: Tensor) -> None:
        """Put tokens to their places, in a pool of at least so many blocks."""
        if blocks > self.capacity:
            self._resize(blocks)
        to = (places.block_n.to(self.device), places.offset_n.to(self.device))
        there = (places.lane_n.to(k_RTE.device), places.token_n.to(k_RTE.device))
        for tensors, new_RTE in ((self.k, k_RTE), (self.v, v_RTE)):
            for tensor, part in zip(tensors, self.codec.encode(new_RTE[there]), strict=True):
                tensor[to] = part.to(self.device)
        self.position_NC[to] = position_RT.to(k_RTE.device)[there].to(self.position_NC)
        if self.worth_NC is not None:
            self.worth_NC[to] = float("nan")

    def copy(self, blocks: int) -> "Pool":
        """A pool of its own with the first so many blocks."""
        other = Pool(self.block, self.codec, self.none_E)
        other.k, other.v = (tuple(t[:blocks].clone() for t in tensors) for tensors in (self.k, self.v))
        other.position_NC = self.position_NC[:blocks].clone()
        other.worth_NC = None if self.worth_NC is None else self.worth_NC[:blocks].clone()
        return other

    def compacted(self, layout: BlockLayout, kept_NC: Tensor) -> tuple["Pool", BlockLayout]:
        """These tokens alone in as few blocks as they need, every lane's in order, and the layout there."""
        order = torch.cat([layout.blocks_of(lane) for lane in range(layout.lanes)])
        row, offset = kept_NC[order].nonzero(as_tuple=True)
        lane = layout.owner_N[order][row]
        lengths_R = torch.bincount(lane, minlength=layout.lanes)
        empty = layout.once("empty", lambda: BlockLayout.empty(layout.lanes, layout.block))
        compact, places = empty.append(torch.arange(int(lengths_R.max())) < lengths_R[:, None])
        source = (order[row].to(self.device), offset.to(self.device))
        target = (places.block_n.to(self.device), places.offset_n.to(self.device))

        def moved(tensor: Tensor) -> Tensor:
            new = tensor.new_zeros(compact.capacity, *tensor.shape[1:])
            new[target] = tensor[source]
            return new

        other = Pool(self.block, self.codec, self.none_E)
        other.k, other.v = tuple(moved(t) for t in self.k), tuple(moved(t) for t in self.v)
        other.position_NC = moved(self.position_NC)
        other.worth_NC = None if self.worth_NC is None else moved(self.worth_NC)
        return other, compact

    def _resize(self, blocks: int) -> None:
        def grown(old: Tensor) -> Tensor:
            # Zeros: what no token has been written to is multiplied by a weight of 0, and must be a number.
            return torch.cat((old, old.new_zeros(blocks - len(old), *old.shape[1:])))

        self.k, self.v = tuple(grown(t) for t in self.k), tuple(grown(t) for t in self.v)
        self.position_NC = grown(self.position_NC)
        self.worth_NC = None if self.worth_NC is None else grown(self.worth_NC)
