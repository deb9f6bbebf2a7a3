"""``longctx bench decode``: one token over a cache spread over ranks, by tree and by ring; measured, and computed.

Tree: every rank attends to its own keys, and a maximum and a sum join the results. Ring: all keys and values travel
once around the ranks, the next block on its way while a rank works on this one (the comparison of Shyam et al.,
arXiv 2408.04093). Computed times are of links and memory alone, with the figures of :class:`Links`.

Legend: B = 1 row, H query heads, K kv heads, E head dim, S keys of all ranks, P ranks.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.kernels import Scoring
from longctx.attention.merge import merge_
from longctx.bench.crew import Crew
from longctx.bench.problem import Shape
from longctx.cache.attend import attend
from longctx.cache.options import CacheOptions
from longctx.cache.pool import Pool
from longctx.cache.ragged import RaggedKV
from longctx.runtime.mesh import Group, folded
from longctx.sequence.collectives.reduce import reduced_bytes

METHODS = ("tree", "ring")


@dataclass(frozen=True)
class Links:
    """What times are computed with: nodes of eight H100 (NVLink, 400 Gbit/s InfiniBand), bf16 keys and values.

    Args:
        inside, across: bytes per second of a link inside a node and between two.
        hop_inside, hop_across: seconds until the first byte arrives.
        memory: bytes per second at which a rank reads its keys.
    """

    node: int = 8
    inside: float = 450e9
    across: float = 50e9
    hop_inside: float = 5e-6
    hop_across: float = 10e-6
    memory: float = 3.0e12
    itemsize: int = 2


@dataclass(frozen=True)
class Decode:
    """One token and layer: bytes a rank sends, seconds by tree and ring, and how many times longer the ring takes."""

    ranks: int
    measured: bool
    tree_bytes: float
    ring_bytes: float
    tree_seconds: float
    ring_seconds: float

    @property
    def ratio(self) -> float:
        """Ring over tree."""
        return self.ring_seconds / self.tree_seconds


def measured_decode(shape: Shape, name: str, group: Group) -> Callable[[], float]:
    """A function that runs ``decode/METHOD`` once and returns its seconds."""
    attended = decoding(shape, name.partition("/")[2], group)

    def run() -> float:
        started = time.perf_counter()
        attended()
        return time.perf_counter() - started

    return run


def decoding(shape: Shape, method: str, group: Group) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that attends one query to ``shape.length`` keys: out [1, 1, H, E] and log-sum-exp [1, 1, H]."""
    size = (1, shape.length // group.size, shape.kv_heads, shape.head_dim)
    generator = torch.Generator().manual_seed(shape.seed + group.rank)
    k, v = (torch.randn(size, generator=generator) for _ in range(2))
    q = torch.randn(1, 1, shape.heads, shape.head_dim, generator=torch.Generator().manual_seed(shape.seed))
    at, scoring = torch.full((1, 1), shape.length), Scoring(shape.head_dim**-0.5)
    ranks = group if method == "tree" else None
    cache = RaggedKV.empty(1, shape.kv_heads, shape.head_dim, k).append(k, v, torch.arange(size[1])[None])
    # Filled as if alone, so that every rank has as many; then told of the others.
    cache = RaggedKV(cache.pool, CacheOptions(ranks=ranks), shape.kv_heads, cache.layout, cache.seen)
    return partial(attend, q, cache, at, scoring) if method == "tree" else partial(_ring, q, cache, group, at, scoring)


@torch.no_grad()
def _ring(q: Tensor, own: RaggedKV, group: Group, at: Tensor, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """The keys of all ranks, one after the other; the next ones come while these are worked on.

    Blocks travel as they lie, so that a rank has nothing to do but to attend.
    """
    out = lse = None
    kv = torch.stack((own.pool.k[0], own.pool.v[0]))
    for step in range(group.size):
        coming, works = torch.empty_like(kv), []
        if step + 1 < group.size:
            right, left = (group.ranks[(group.rank + side) % group.size] for side in (1, -1))
            works = [dist.isend(kv, right, group=group.handle), dist.irecv(coming, left, group=group.handle)]
        there = Pool(own.pool.block, own.pool.codec, own.pool.none_E)
        there.k, there.v, there.position_NC = (kv[0],), (kv[1],), own.pool.position_NC
        part = attend(q, RaggedKV(there, own.options, own.kv_heads, own.layout, own.seen), at, scoring)
        part_out, part_lse = (t.flatten(0, 1).contiguous() for t in part)
        if out is None or lse is None:
            out, lse = part_out, part_lse
        else:
            merge_(out, lse, part_out, part_lse)
        for work in works:
            if work is not None:
                work.wait()
        kv = coming
    assert out is not None and lse is not None
    return out[None], lse[None]


def measure(
    shape: Shape, ranks: Sequence[int], rounds: int, advance: Callable[[str], None] = lambda _: None
) -> list[Decode]:
    """Time both methods on each number of ranks, in turns; medians."""
    found = []
    for count in ranks:
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        with Crew(count, 1) as crew:
            for _ in range(rounds):
                for method in METHODS:
                    advance(f"{method} {count}")
                    order = {"contender": f"decode/{method}", "shape": asdict(shape), "runs": 3}
                    seconds[method].append(crew.world(order)["seconds"])
        sent = _bytes(shape, Group(0, tuple(range(count))), 4)
        found.append(Decode(count, True, *sent, median(seconds["tree"]), median(seconds["ring"])))
    return found


def compute(shape: Shape, ranks: Sequence[int], links: Links | None = None) -> list[Decode]:
    """The same from :class:`Links` alone; whole nodes."""
    links = links or Links()
    return [_computed(shape, count, links) for count in ranks]


def _bytes(shape: Shape, group: Group, itemsize: int) -> tuple[float, float]:
    """What one rank sends by tree (partial results in fp32) and by ring."""
    tree = reduced_bytes(group, 4 * shape.heads) + reduced_bytes(group, 4 * shape.heads * (shape.head_dim + 1))
    own = 2 * itemsize * shape.kv_heads * shape.head_dim * shape.length / group.size
    return tree, own * (group.size - 1)


def _computed(shape: Shape, count: int, links: Links) -> Decode:
    group = folded(0, count, min(links.node, count))
    tree_bytes, ring_bytes = _bytes(shape, group, links.itemsize)
    read = 2 * links.itemsize * shape.kv_heads * shape.head_dim * shape.length / count / links.memory
    inner, outer = (part.size if part is not None else 1 for part in (group.inner, group.outer))
    # Two reductions, each up and down a tree in every level.
    hops = 4 * (math.ceil(math.log2(inner)) * links.hop_inside + math.ceil(math.log2(outer)) * links.hop_across)
    payload = 4 * shape.heads * (shape.head_dim + 2)
    wire = 2 * payload * ((inner - 1) / inner / links.inside + (outer - 1) / outer / links.across)
    slowest, hop = (links.across, links.hop_across) if outer > 1 else (links.inside, links.hop_inside)
    step = max(read, hop + ring_bytes / max(1, count - 1) / slowest)
    return Decode(count, False, tree_bytes, ring_bytes, read + hops + wire, read + (count - 1) * step)


def table(found: Sequence[Decode]) -> list[str]:
    """The results as lines of text."""
    lines = ["| ranks | | KB sent by tree | by ring | ms by tree | by ring | ring / tree |", "|---" * 7 + "|"]
    for row in found:
        numbers = f"{row.tree_bytes / 1e3:,.1f} | {row.ring_bytes / 1e3:,.0f} | {row.tree_seconds * 1e3:.3f}"
        how = "measured" if row.measured else "computed"
        lines.append(f"| {row.ranks} | {how} | {numbers} | {row.ring_seconds * 1e3:.3f} | {row.ratio:.1f} |")
    return lines
