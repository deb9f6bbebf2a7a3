"""Attention to the nearest keys alone, found by an index: for decoding on CPUs, without training.

IceFormer (Mao et al., ICLR 2024, arXiv 2405.02842). Keys are lifted so that the nearest in Euclidean distance is the
one of the largest dot product: ``[k / c, sqrt(1 - |k|^2 / c^2)]`` and ``[q / |q|, 0]`` with ``c`` at least the longest
key's norm. The paper searches by Prioritized DCI; here it is a graph of near neighbours (HNSW, Malkov and Yashunin,
arXiv 1603.09320) of the library faiss. What the index gives is compared by raw dot products, which do not depend on c,
also between ranks. How many of the true nearest are found is measured by :func:`recall`, not promised.

The index is a value beside the keys: it covers the tokens before a position, newer ones are attended to exactly, and
once there are enough of them a copy of it takes them up. A cache that goes back marks what it left, and a fork keeps
the index of its time. Prompts are attended to in full, where the paper searches there, too.

Legend: B batch, K kv heads, R = B x K lanes, Q queries of a lane, n tokens of a lane on this rank, F fresh, N indexed
and M proposed ones, E head dim.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longctx.cache.ranks import Ranks
from longctx.cache.search import Proposed, Search, lane_positions, lane_rows, visible
from longctx.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from longctx.cache.ragged import RaggedKV

_MARGIN = 1.25
"""Later keys may be longer by so much before all are lifted again."""


@dataclass(frozen=True)
class LaneIndex:
    """Keys of one lane in a graph. Never changed.

    Args:
        graph: of lifted keys, numbered from 0; None: of none.
        longest: c, which no key's norm exceeds.
        position_N: of the key of every number; -1: it has left.
    """

    graph: Any
    longest: float
    position_N: Tensor

    @classmethod
    def of(cls, k_NE: Tensor, position_N: Tensor, settings: "Neighbours") -> "LaneIndex":
        """These keys alone."""
        longest = _MARGIN * float(k_NE.norm(dim=-1).max()) if len(k_NE) else 0.0
        graph = _faiss().IndexHNSWFlat(k_NE.shape[1] + 1, settings.links)
        graph.hnsw.efConstruction = settings.breadth
        graph.add(_numbers(lifted_keys(k_NE, longest)))
        return cls(graph, longest, position_N)

    def cut(self, before: int) -> "LaneIndex":
        """Without the tokens from position ``before`` on."""
        return replace(self, position_N=self.position_N.masked_fill(self.position_N >= before, -1))

    @property
    def before(self) -> int:
        """The position behind the last one; rows of different lengths differ in it."""
        return int(self.position_N.max()) + 1 if len(self.position_N) else 0

    def extended(self, k_nE: Tensor, position_n: Tensor, settings: "Neighbours") -> "LaneIndex":
        """With all keys of the lane, of which it has those up to some position.

        A copy takes up the new ones; a new graph is made where a key is longer than c, or half of the old one has left.
        """
        kept_N = torch.isin(self.position_N, position_n)
        position_N = self.position_N.where(kept_N, -1)
        fresh_n = position_n > position_N.max() if len(position_N) else torch.ones_like(position_n, dtype=torch.bool)
        k_FE = k_nE[fresh_n]
        if 2 * int(kept_N.sum()) < len(kept_N) or (len(k_FE) and float(k_FE.norm(dim=-1).max()) > self.longest):
            return LaneIndex.of(k_nE, position_n, settings)
        graph = _faiss().clone_index(self.graph)
        graph.hnsw.efConstruction = settings.breadth
        graph.add(_numbers(lifted_keys(k_FE, self.longest)))
        return LaneIndex(graph, self.longest, torch.cat((position_N, position_n[fresh_n])))

    def nearest(self, q_QE: Tensor, count: int, breadth: int) -> Tensor:
        """Numbers [Q, count] of keys of large dot product, -1 where fewer are found."""
        if count >= len(self.position_N):
            return torch.arange(len(self.position_N)).expand(len(q_QE), -1)
        search = _faiss().SearchParametersHNSW(efSearch=max(breadth, count))
        _, found = self.graph.search(_numbers(lifted_queries(q_QE)), count, params=search)
        return torch.from_numpy(found)


class Indexed(NamedTuple):
    """Indices of all lanes over the tokens before position ``before``."""

    before: int
    lanes: tuple[LaneIndex, ...]


@dataclass(frozen=True)
class Neighbours(Search):
    """See the top of this file.

    Args:
        count: nearest keys that a query of every head attends to, beside those that are not indexed yet.
        every: new tokens of a row after which they are indexed.
        links: neighbours of a key in the graph.
        breadth: candidates that a search and an insertion look at; the larger, the more are found and the slower.

    Raises:
        ConfigError: values below 1 (2 links).
        UnsupportedError: faiss is not installed.
    """

    count: int
    every: int = 1024
    links: int = 16
    breadth: int = 128

    def __post_init__(self) -> None:
        if min(self.count, self.every, self.breadth) < 1 or self.links < 2:
            raise ConfigError(f"{self}: count, every and breadth are 1 or more, links 2 or more")
        _faiss()

    def indexed(self, cache: "RaggedKV") -> Indexed | None:
        """See :class:`Search`.

        Raises:
            UnsupportedError: the cache is not in the memory of a CPU.
        """
        _check_device(cache)
        index: Indexed | None = cache.index
        if cache.seen - (0 if index is None else index.before) < self.every:
            return index
        lanes = []
        for lane in range(cache.layout.lanes):
            k_nE, _, position_n = cache.lane(lane)
            old = None if index is None else index.lanes[lane]
            new = LaneIndex.of(k_nE, position_n, self) if old is None else old.extended(k_nE, position_n, self)
            lanes.append(new)
        return Indexed(cache.seen, tuple(lanes))

    def cut(self, index: Any, before: int) -> Any:
        """See :class:`Search`."""
        if index is None or index.before <= before:
            return index
        return Indexed(before, tuple(lane.cut(before) for lane in index.lanes))

    def propose(
        self, q_RQE: Tensor, at_RQ: Tensor, cache: "RaggedKV", window: int | None
    ) -> tuple[list[Proposed], Tensor]:
        """See :class:`Search`."""
        _check_device(cache)
        found = [self._of_lane(q_RQE[lane], at_RQ[lane], cache, lane, window) for lane in range(len(q_RQE))]
        fresh_RQ = torch.stack([(scores == float("inf")).sum(1) for _, _, scores in found])
        ranks = Ranks(cache.seen, cache.options.ranks, cache.options.ledger)
        return found, ranks.total(fresh_RQ) + self.count

    def _of_lane(self, q_QE: Tensor, at_Q: Tensor, cache: "RaggedKV", lane: int, window: int | None) -> Proposed:
        """Fresh tokens, in any case, and the nearest of those before."""
        position_n, index = lane_positions(cache, lane), cache.index
        start = 0 if index is None else int(torch.searchsorted(position_n, index.lanes[lane].before))
        token_QF = torch.arange(start, len(position_n)).expand(len(q_QE), -1)
        position_QF = position_n[start:].expand(len(q_QE), -1)
        wide = torch.promote_types(q_QE.dtype, torch.float32)
        fresh = q_QE.new_full(token_QF.shape, float("inf"), dtype=wide)
        fresh = fresh.masked_fill(~visible(position_QF, at_Q, window), float("-inf"))
        if index is None or not start:
            return Proposed(token_QF, position_QF, fresh)
        token_QM, position_QM, seen_QM = self._nearest(q_QE, at_Q, index.lanes[lane], position_n, window)
        k_QME = lane_rows(cache, cache.pool.k, lane, token_QM)
        score_QM = torch.einsum("qe,qme->qm", q_QE, k_QME).to(wide).masked_fill(~seen_QM, float("-inf"))
        return Proposed(
            torch.cat((token_QM, token_QF), 1),
            torch.cat((position_QM, position_QF), 1),
            torch.cat((score_QM, fresh), 1),
        )

    def _nearest(
        self, q_QE: Tensor, at_Q: Tensor, index: LaneIndex, position_n: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [Q, M] by place in the lane, their positions, and which of them a query sees."""
        alive_QN = visible(index.position_N, at_Q, window) & (index.position_N >= 0)
        hidden = int((~alive_QN).sum(1).max())  # that many more may be found and are of no use
        number_QM = index.nearest(q_QE, self.count + hidden, self.breadth)
        position_QM = index.position_N[number_QM.clamp_min(0)].masked_fill(number_QM < 0, -1)
        token_QM = torch.searchsorted(position_n, position_QM.contiguous()).clamp_max(len(position_n) - 1)
        held_QM = position_n[token_QM] == position_QM
        return token_QM, position_QM, held_QM & visible(position_QM, at_Q, window)


def lifted_keys(k_NE: Tensor, longest: float) -> Tensor:
    """Unit vectors [N, E + 1], fp32, whose nearest to a lifted query is the key of the largest dot product.

    Args:
        longest: at least the longest key's norm.
    """
    unit_NE = k_NE.double() / max(longest, torch.finfo(torch.float32).tiny)
    rest_N1 = (1 - unit_NE.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()
    return torch.cat((unit_NE, rest_N1), dim=-1).float()


def lifted_queries(q_QE: Tensor) -> Tensor:
    """Unit vectors [Q, E + 1], fp32."""
    unit_QE = torch.nn.functional.normalize(q_QE.double(), dim=-1)
    return torch.cat((unit_QE, torch.zeros_like(unit_QE[:, :1])), dim=-1).float()


def recall(k_NE: Tensor, q_QE: Tensor, settings: Neighbours) -> float:
    """Mean share, of the ``count`` keys of the largest dot products with a query, that an index of the keys finds."""
    index = LaneIndex.of(k_NE, torch.arange(len(k_NE)), settings)
    found_QM = index.nearest(q_QE, settings.count, settings.breadth)
    wanted_QM = (q_QE @ k_NE.mT).topk(min(settings.count, len(k_NE)), dim=1).indices
    hits = (wanted_QM[:, :, None] == found_QM[:, None]).any(2)
    return float(hits.double().mean())


def _numbers(rows: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = rows.contiguous().numpy()
    return found


def _check_device(cache: "RaggedKV") -> None:
    if cache.pool.device.type != "cpu":
        raise UnsupportedError(
            f"Neighbours searches on a CPU and the cache is on {cache.pool.device}; use --device cpu, or Loki"
        )


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UnsupportedError(
            'Neighbours needs the library faiss; install it with pip install "longctx[neighbours]"'
        ) from None
    return faiss
