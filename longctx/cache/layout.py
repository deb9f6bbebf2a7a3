"""Which block holds what: integers on the host, without keys or values. Layers in step share one layout.

A layout is a value. What follows from it (its counts, the layout after some more tokens and where these go) is found
once, however many layers ask.

Legend: R lanes (a row of the batch and a kv head each), N blocks, C tokens per block, T new tokens, n of them taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

SPARE = 8
"""A layout that is full grows by one block in so many."""


class Places(NamedTuple):
    """Where new tokens go: token ``token_n`` of lane ``lane_n`` to place ``offset_n`` of block ``block_n``."""

    lane_n: Tensor
    token_n: Tensor
    block_n: Tensor
    offset_n: Tensor


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Block n holds tokens ``ordinal_N[n] * C`` and after of lane ``owner_N[n]``; it is free where that is -1.

    Args:
        lengths_R: tokens of every lane.
        last_R: the last block of every lane; -1 for a lane without tokens.
    """

    block: int
    lengths_R: Tensor
    owner_N: Tensor
    ordinal_N: Tensor
    last_R: Tensor
    _of_blocks: dict[Any, Any] = field(default_factory=dict, repr=False)
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    # Weakly: a long text would else keep a layout for each of its tokens.
    _after: WeakValueDictionary[Any, "BlockLayout"] = field(default_factory=WeakValueDictionary, init=False, repr=False)
    _covers: WeakKeyDictionary["BlockLayout", bool] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    @staticmethod
    def empty(lanes: int, block: int) -> "BlockLayout":
        """No block."""
        none, zeros = torch.empty(0, dtype=torch.int64), torch.zeros(lanes, dtype=torch.int64)
        return BlockLayout(block, zeros, none, none, zeros - 1)

    @property
    def lanes(self) -> int:
        return self.lengths_R.shape[0]

    @property
    def capacity(self) -> int:
        """Blocks there is room for."""
        return self.owner_N.shape[0]

    @property
    def used(self) -> int:
        """Blocks in use: the sum over lanes of ceil(length / C)."""
        return int((-(-self.lengths_R // self.block)).sum())

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make()`` returned the first time ``key`` was asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def of_blocks(self, key: Any, make: Callable[[], Any]) -> Any:
        """The same of what stays while all lanes grow or shrink by as many tokens within the blocks that they have."""
        if key not in self._of_blocks:
            self._of_blocks[key] = make()
        return self._of_blocks[key]

    @property
    def held(self) -> Tensor:
        """Ids of the blocks in use, ascending."""
        ids: Tensor = self.of_blocks("held", lambda: (self.owner_N >= 0).nonzero()[:, 0])
        return ids

    def counts(self) -> Tensor:
        """Tokens [N] in every block."""

        def find() -> Tensor:
            ends_N = self.lengths_R[self.owner_N.clamp_min(0)] - self.ordinal_N * self.block
            return torch.where(self.owner_N >= 0, ends_N.clamp(0, self.block), 0)

        counts_N: Tensor = self.once("counts", find)
        return counts_N

    def behind(self) -> Tensor:
        """Tokens [N] of its lane behind every block; below 0 where it is not full; of no meaning for free ones."""
        behind_N: Tensor = self.once(
            "behind", lambda: self.lengths_R[self.owner_N.clamp_min(0)] - (self.ordinal_N + 1) * self.block
        )
        return behind_N

    def covers(self, other: "BlockLayout") -> bool:
        """Whether no lane of ``other`` has more tokens."""
        if other not in self._covers:
            self._covers[other] = bool((other.lengths_R <= self.lengths_R).all())
        return self._covers[other]

    def blocks_of(self, lane: int) -> Tensor:
        """Ids of the blocks of a lane, in order."""

        def find() -> Tensor:
            ids = (self.owner_N == lane).nonzero()[:, 0]
            return ids[self.ordinal_N[ids].argsort()]

        ids: Tensor = self.of_blocks(("lane", lane), find)
        return ids

    def first_places(self, counts_R: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks and offsets [m] of the first so many tokens of every lane, one lane after another."""
        tokens = [torch.arange(count) for count in counts_R.tolist()]
        blocks = [self.blocks_of(lane)[token_n // self.block] for lane, token_n in enumerate(tokens)]
        return torch.cat(blocks), torch.cat(tokens) % self.block

    def append(self, taken_RT: Tensor) -> tuple["BlockLayout", Places]:
        """The layout with these of T tokens behind every lane, and where they go."""
        key = ("append", taken_RT.shape[1], taken_RT.numpy().tobytes())
        after = self._shared(key, lambda: self._appended(taken_RT))
        return after, after.came

    def extended(self, tokens: int) -> "BlockLayout":
        """The layout with so many tokens behind every lane."""
        return self._shared(("all", tokens), lambda: self._extended(tokens))

    @property
    def came(self) -> Places:
        """Where the last tokens went that were appended; only of a layout that :meth:`append` made."""
        places: Places = self._made["came"]
        return places

    def _shared(self, key: Any, make: Callable[[], "BlockLayout"]) -> "BlockLayout":
        found = self._after.get(key)
        if found is None:
            found = self._after[key] = make()
        return found

    def _extended(self, tokens: int) -> "BlockLayout":
        open_R = -self.lengths_R % self.block
        if bool((open_R < tokens).any()):
            return self._appended(torch.ones(self.lanes, tokens, dtype=torch.bool))
        # Most steps by far: into blocks that are open.
        after = self._of_as_many_blocks(self.lengths_R + tokens)
        lane_RT = torch.arange(self.lanes)[:, None].expand(self.lanes, tokens)
        token_RT, block_RT = torch.arange(tokens).expand_as(lane_RT), self.last_R[:, None].expand_as(lane_RT)
        places = (lane_RT, token_RT, block_RT, token_RT + (self.block - open_R)[:, None])
        after._made["came"] = Places(*(index_RT.flatten() for index_RT in places))
        return after

    def _of_as_many_blocks(self, lengths_R: Tensor) -> "BlockLayout":
        """As many tokens more or fewer in every lane, in the same blocks."""
        return BlockLayout(self.block, lengths_R, self.owner_N, self.ordinal_N, self.last_R, self._of_blocks)

    def _appended(self, taken_RT: Tensor) -> "BlockLayout":
        counts_R = taken_RT.sum(1)
        blocks_R = -(-self.lengths_R // self.block)
        new_R = -(-(self.lengths_R + counts_R) // self.block) - blocks_R
        owner_N, ordinal_N, ids = self._taken(int(new_R.sum()))
        lane_n, first_R = torch.repeat_interleave(torch.arange(self.lanes), new_R), new_R.cumsum(0) - new_R
        owner_N[ids] = lane_n
        ordinal_N[ids] = torch.arange(len(ids)) - first_R[lane_n] + blocks_R[lane_n]
        lane, token = taken_RT.nonzero(as_tuple=True)
        place = self.lengths_R[lane] + torch.arange(len(lane)) - (counts_R.cumsum(0) - counts_R)[lane]
        beyond = place // self.block - blocks_R[lane]  # how many blocks behind the open one
        fresh = torch.cat((ids, ids.new_full((1,), -1)))[(first_R[lane] + beyond).clamp(0, len(ids))]
        block = torch.where(beyond >= 0, fresh, self.last_R[lane])
        last_R = self.last_R.clone()
        grown = new_R > 0
        last_R[grown] = ids[(first_R + new_R - 1)[grown]]
        after = BlockLayout(self.block, self.lengths_R + counts_R, owner_N, ordinal_N, last_R)
        after._made["came"] = Places(lane, token, block, place % self.block)
        return after

    def _taken(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Owners and ordinals to be changed, with so many free blocks, and their ids."""
        free = (self.owner_N < 0).nonzero()[:, 0]
        more = 0 if len(free) >= count else max(count - len(free), self.capacity // SPARE)
        none = torch.full((more,), -1)
        owner_N, ordinal_N = torch.cat((self.owner_N, none)), torch.cat((self.ordinal_N, none))
        return owner_N, ordinal_N, torch.cat((free, torch.arange(self.capacity, self.capacity + more)))[:count]

    def cut(self, lengths_R: Tensor) -> "BlockLayout":
        """With no more than so many tokens in every lane."""
        return self._shared(("cut", lengths_R.numpy().tobytes()), lambda: self._cut(lengths_R))

    def _cut(self, lengths_R: Tensor) -> "BlockLayout":
        fewer_R, blocks_R = self.lengths_R - lengths_R, -(-lengths_R // self.block)
        if bool((fewer_R == fewer_R[0]).all()) and torch.equal(blocks_R, -(-self.lengths_R // self.block)):
            return self._of_as_many_blocks(lengths_R)
        stays_N = (self.owner_N >= 0) & (self.ordinal_N * self.block < lengths_R[self.owner_N.clamp_min(0)])
        owner_N = torch.where(stays_N, self.owner_N, -1)
        last_R, held = torch.full_like(self.last_R, -1), stays_N.nonzero()[:, 0]
        is_last = self.ordinal_N[held] == (blocks_R - 1)[owner_N[held]]
        last_R[owner_N[held[is_last]]] = held[is_last]
        return BlockLayout(self.block, lengths_R, owner_N, self.ordinal_N, last_R)
