"""``longctx bench attention --simulate``: bytes, hops and balance of every scheme from the plan alone, no tensors."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longctx.attention.choice import candidates, heaviest, sampled
from longctx.attention.schemes import schedules_of
from longctx.attention.traffic import Call, planned_passes
from longctx.bench.problem import Shape
from longctx.runtime.mesh import folded
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS
from longctx.sequence.plan import Documents


@dataclass(frozen=True)
class Planned:
    """One scheme and layout on one number of ranks, for one layer and step.

    Args:
        bytes: sent by the rank that sends most, forward and backward.
        crossing: of these, to other inner groups.
        hops: steps of the ring after the own block; 0 for schemes without one.
        balance: pairs of query and key, times heads, of the busiest rank divided by the mean.
    """

    ranks: int
    scheme: str
    layout: str
    documents: str
    bytes: int
    crossing: int
    hops: int
    balance: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def simulate(shape: Shape, most: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Planned]:
    """Every scheme on 8, 16, ... up to ``most`` ranks in nodes of ``inner``, on one document and on packed ones."""
    call = Call(shape.heads, shape.kv_heads, shape.head_dim, dtype)
    ranks = 8
    while ranks <= most:
        for name, documents, layouts in (
            ("one", ((0,),), ("contiguous", "zigzag", "striped")),
            ("packed", shape.packed(), ("zigzag", "balanced")),
        ):
            yield from _on(ranks, min(inner, ranks), name, documents, layouts, shape, call)
        ranks *= 2


def _on(
    ranks: int, inner: int, name: str, documents: Documents, layouts: tuple[str, ...], shape: Shape, call: Call
) -> Iterator[Planned]:
    for layout in layouts:
        cut = LAYOUTS[layout](shape.length, ranks, documents)
        base = SequenceContext(folded(0, ranks, inner), cut, documents)
        for scheme in candidates(base, call):
            yield _planned(ranks, inner, scheme, layout, name, base, call)


def _planned(ranks: int, inner: int, scheme: str, layout: str, name: str, base: SequenceContext, call: Call) -> Planned:
    most = crossing = 0
    for rank in sampled(ranks, inner):
        context = base.seen_from(folded(rank, ranks, inner), scheme)
        forward, backward = planned_passes(context, call)
        sends = [t for t in forward + backward if t.direction == "send"]
        most = max(most, sum(t.bytes for t in sends))
        crossing = max(crossing, sum(t.bytes for t in sends if t.peer // inner != rank // inner))
    context = base.seen_from(folded(0, ranks, inner), scheme)
    mean = sum(context.plan(call.causal, call.window).work) * call.heads / ranks
    return Planned(ranks, scheme, layout, name, most, crossing, _hops(context, call), heaviest(context, call) / mean)


def _hops(context: SequenceContext, call: Call) -> int:
    if context.scheme in ("ring", "double_ring"):
        assert context.group.inner is not None
        width = context.group.inner.size if context.scheme == "double_ring" else None
        return len(schedules_of(context, context.plan(call.causal, call.window), width).there.steps) - 1
    if context.scheme == "hybrid":
        assert context.group.outer is not None
        return context.group.outer.size - 1
    return 0


def table(rows: list[Planned]) -> list[str]:
    """The rows as lines of text."""
    lines = [
        "| ranks | documents | layout | scheme | MB sent per rank | of these between nodes | hops | max/mean work |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.ranks} | {row.documents} | {row.layout} | {row.scheme} | {row.bytes / 1e6:,.1f} | "
            f"{row.crossing / 1e6:,.1f} | {row.hops} | {row.balance:.3f} |"
        )
    return lines
