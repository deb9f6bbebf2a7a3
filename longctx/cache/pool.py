"""Storage of one layer's keys and values in blocks of equal size, each owned by one lane.

Legend: R lanes (a row of the batch and a kv head each), N blocks, C tokens per block, E head dim, T new tokens.
"""

from weakref import WeakSet

import torch
from torch import Tensor

from longctx.cache.codec import Codec, Stored

_SPARE = 8
"""A pool that is full grows by one block in so many."""


class Pool:
    """Blocks and who owns them. Block n holds tokens ``ordinal_N[n] * C`` and after of lane ``owner_N[n]``, or none.

    ``position_NC`` are the positions of the tokens in their sequence: ascending along a lane, with gaps where tokens
    were evicted. Owners and ordinals are on the host; ``users`` are the caches that share the pool.

    Args:
        none_E: a row's size, dtype and device.
    """

    def __init__(self, lanes: int, block: int, codec: Codec, none_E: Tensor) -> None:
        self.lanes, self.block, self.codec, self.device = lanes, block, codec, none_E.device
        self.none_E = none_E
        self.k: Stored = codec.encode(none_E.new_empty(0, block, none_E.shape[-1]))
        self.v: Stored = codec.encode(none_E.new_empty(0, block, none_E.shape[-1]))
        self.position_NC = torch.empty(0, block, dtype=torch.int32, device=none_E.device)
        self.owner_N = torch.empty(0, dtype=torch.int64)
        self.ordinal_N = torch.empty(0, dtype=torch.int64)
        self.last_R = torch.full((lanes,), -1)
        self.users: WeakSet[object] = WeakSet()

    @property
    def capacity(self) -> int:
        """Blocks there is room for."""
        return len(self.owner_N)

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys, values and positions."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v, self.position_NC))

    def counts(self, lengths_R: Tensor) -> Tensor:
        """Tokens [N] in every block, of lanes of these lengths."""
        ends_N = lengths_R[self.owner_N.clamp_min(0)] - self.ordinal_N * self.block
        return torch.where(self.owner_N >= 0, ends_N.clamp(0, self.block), 0)

    def write(self, lengths_R: Tensor, counts_R: Tensor, k_RTE: Tensor, v_RTE: Tensor, position_RT: Tensor) -> None:
        """Put the first ``counts_R`` tokens of every lane behind its ``lengths_R`` ones, and free what was there."""
        self._forget(lengths_R)
        blocks_R = -(-lengths_R // self.block)
        new_R = -(-(lengths_R + counts_R) // self.block) - blocks_R
        ids = self._take(int(new_R.sum()))
        lane_n, first_R = torch.repeat_interleave(torch.arange(self.lanes), new_R), new_R.cumsum(0) - new_R
        self.owner_N[ids] = lane_n
        self.ordinal_N[ids] = torch.arange(len(ids)) - first_R[lane_n] + blocks_R[lane_n]
        lane, token = (torch.arange(k_RTE.shape[1]) < counts_R[:, None]).nonzero(as_tuple=True)
        place = lengths_R[lane] + token
        beyond = place // self.block - blocks_R[lane]  # how many blocks behind the open one
        fresh = torch.cat((ids, ids.new_full((1,), -1)))[(first_R[lane] + beyond).clamp(0, len(ids))]
        block = torch.where(beyond >= 0, fresh, self.last_R[lane])
        self._put((block, place % self.block), (lane, token), k_RTE, v_RTE, position_RT)
        grown = new_R > 0
        self.last_R[grown] = ids[(first_R + new_R - 1)[grown]]

    def compacted(self, kept_NC: Tensor) -> tuple["Pool", Tensor]:
        """A pool of exactly the blocks that these tokens need, each lane's in order, and how many [R] each lane has."""
        other = Pool(self.lanes, self.block, self.codec, self.none_E)
        owned = (self.owner_N >= 0).nonzero()[:, 0]
        keys = self.owner_N[owned] * (int(self.ordinal_N.max()) + 1 if self.capacity else 1) + self.ordinal_N[owned]
        order = owned[keys.argsort()]
        row, offset = kept_NC[order].nonzero(as_tuple=True)
        lane = self.owner_N[order][row]
        lengths_R = torch.bincount(lane, minlength=self.lanes)
        blocks_R = -(-lengths_R // self.block)
        rank = torch.arange(len(lane)) - (lengths_R.cumsum(0) - lengths_R)[lane]
        starts_R = blocks_R.cumsum(0) - blocks_R
        other.owner_N = torch.repeat_interleave(torch.arange(self.lanes), blocks_R)
        other.ordinal_N = torch.arange(len(other.owner_N)) - starts_R[other.owner_N]
        other.last_R = torch.where(blocks_R > 0, starts_R + blocks_R - 1, -1)
        source = (order[row].to(self.device), offset.to(self.device))
        target = ((starts_R[lane] + rank // self.block).to(self.device), (rank % self.block).to(self.device))

        def moved(tensor: Tensor) -> Tensor:
            new = tensor.new_zeros(len(other.owner_N), *tensor.shape[1:])
            new[target] = tensor[source]
            return new

        other.k, other.v = tuple(moved(t) for t in self.k), tuple(moved(t) for t in self.v)
        other.position_NC = moved(self.position_NC)
        return other, lengths_R

    def copy(self, lengths_R: Tensor) -> "Pool":
        """A pool of its own with what lanes of these lengths see."""
        return self.compacted(torch.arange(self.block) < self.counts(lengths_R)[:, None])[0]

    def drop(self, block_n: Tensor) -> None:
        """Free these blocks."""
        self.owner_N[block_n] = -1

    def _forget(self, lengths_R: Tensor) -> None:
        """Free what lies behind lanes of these lengths."""
        behind_N = (self.owner_N >= 0) & (self.ordinal_N * self.block >= lengths_R[self.owner_N.clamp_min(0)])
        if not behind_N.any():
            return
        self.owner_N[behind_N] = -1
        self.last_R = torch.full((self.lanes,), -1)
        owned = (self.owner_N >= 0).nonzero()[:, 0]
        is_last = self.ordinal_N[owned] == (-(-lengths_R // self.block) - 1)[self.owner_N[owned]]
        self.last_R[self.owner_N[owned[is_last]]] = owned[is_last]

    def _take(self, count: int) -> Tensor:
        """Ids of so many free blocks; the pool grows where it has too few."""
        free = (self.owner_N < 0).nonzero()[:, 0]
        if len(free) < count:
            more = max(count - len(free), self.capacity // _SPARE)
            self._grow(more)
            free = torch.cat((free, torch.arange(self.capacity - more, self.capacity)))
        return free[:count]

    def _grow(self, more: int) -> None:
        def grown(old: Tensor) -> Tensor:
            # Zeros: what no token has been written to is multiplied by a weight of 0, and must be a number.
            return torch.cat((old, old.new_zeros(more, *old.shape[1:])))

        self.k, self.v = tuple(grown(t) for t in self.k), tuple(grown(t) for t in self.v)
        self.position_NC = grown(self.position_NC)
        none = torch.full((more,), -1)
        self.owner_N, self.ordinal_N = torch.cat((self.owner_N, none)), torch.cat((self.ordinal_N, none))

    def _put(
        self, to: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], k_RTE: Tensor, v_RTE: Tensor, position_RT: Tensor
    ) -> None:
        to = (to[0].to(self.device), to[1].to(self.device))
        there = (rows[0].to(k_RTE.device), rows[1].to(k_RTE.device))
        for tensors, new_RTE in ((self.k, k_RTE), (self.v, v_RTE)):
            for tensor, part in zip(tensors, self.codec.encode(new_RTE[there]), strict=True):
                tensor[to] = part.to(self.device)
        self.position_NC[to] = position_RT.to(k_RTE.device)[there].to(self.position_NC)
