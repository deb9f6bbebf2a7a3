"""Choosing a scheme: the planned work and bytes of each, turned into time by a rough model of the machine.

Ring transfers run while blocks are computed, so they cost only what exceeds the computation; exchanges and gathers are
waited for. The slowest rank decides. Only ratios of the machine's figures matter.

Legend: H query heads, K kv heads, E head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from longctx.attention.schemes import SCHEMES, inner_and_outer, joined_plan
from longctx.attention.traffic import Call, planned_passes
from longctx.attention.ulysses import HeadShare
from longctx.runtime.mesh import folded
from longctx.sequence.context import SequenceContext

_FLOPS_PER_PAIR = 14
"""Per query-key pair, head and head dimension: 4 forward, 10 backward (FlashAttention recomputes the scores)."""
_MOST_RANKS = 16
"""Ranks whose messages are looked at."""
_GATHER_LIMIT = 4
"""Gathered keys and values may take this many times the memory of a rank's queries and outputs."""


@dataclass(frozen=True)
class Machine:
    """Attention flops per second of one rank, and bytes per second it sends inside and out of its inner group."""

    flops: float
    inner: float
    outer: float


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        # A Hopper-class GPU with NVLink and one 400 Gb/s adapter; one CPU core with loopback sockets.
        "cuda": Machine(400e12, 200e9, 40e9),
        "cpu": Machine(50e9, 1.5e9, 1e9),
    }
)


@dataclass(frozen=True)
class Choice:
    """A scheme, its estimated seconds per layer and step and those of the others, and why in one sentence."""

    scheme: str
    seconds: Mapping[str, float]
    reason: str


def choose_scheme(context: SequenceContext, call: Call, device: str) -> Choice:
    """The fastest scheme for a call, by estimate; ``context.scheme`` itself does not matter.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    if context.degree == 1:
        return Choice("ring", {"ring": 0.0}, "one rank holds the whole sequence")
    machine = MACHINES.get(device, MACHINES["cuda"])
    seconds = {scheme: estimate(context, scheme, call, machine) for scheme in candidates(context, call)}
    # The first of equals, in the order of SCHEMES: the ring needs least memory.
    best = min(seconds, key=lambda scheme: seconds[scheme])
    others = ", ".join(f"{scheme} {t / seconds[best]:.2f}x" for scheme, t in seconds.items() if scheme != best)
    return Choice(best, seconds, f"the least estimated time per layer (others: {others or 'none'})")


def candidates(context: SequenceContext, call: Call) -> list[str]:
    """Schemes that differ from each other here and fit in memory."""
    inner = context.group.inner.size if context.group.inner else context.degree
    found = ["ring", "ulysses"]
    if 1 < inner < context.degree:
        found += ["hybrid", "double_ring"]
    if context.degree * call.kv_heads <= _GATHER_LIMIT * call.heads:
        found.append("allgather")
    return [scheme for scheme in SCHEMES if scheme in found]


def estimate(context: SequenceContext, scheme: str, call: Call, machine: Machine) -> float:
    """Seconds of one forward and backward of one layer on the slowest rank."""
    degree = context.degree
    inner = context.group.inner.size if context.group.inner else degree
    hidden = waited = 0.0
    for rank in sampled(degree, inner):
        seen = context.seen_from(folded(rank, degree, inner), scheme)
        forward, backward = planned_passes(seen, call)
        times = {"ring": 0.0, "other": 0.0}
        for transfer in forward + backward:
            if transfer.direction == "send":
                rate = machine.inner if transfer.peer // inner == rank // inner else machine.outer
                kind = "ring" if transfer.kind.startswith("ring") else "other"
                times[kind] += transfer.bytes / rate
        hidden, waited = max(hidden, times["ring"]), max(waited, times["other"])
    pairs = heaviest(context.seen_from(folded(0, degree, inner), scheme), call)
    return max(pairs * _FLOPS_PER_PAIR * call.head_dim / machine.flops, hidden) + waited


def sampled(degree: int, inner: int) -> list[int]:
    """Ranks whose messages stand for all where there are many: evenly spaced, with the ends of a node and the ring."""
    return sorted({*range(0, degree, -(-degree // _MOST_RANKS)), inner - 1, degree - 1})


def heaviest(context: SequenceContext, call: Call) -> int:
    """Query-key pairs times heads of the rank that has most."""
    if context.scheme not in ("ulysses", "hybrid"):
        return max(context.plan(call.causal, call.window).work) * call.heads
    inner = inner_and_outer(context)[0].size
    plan = joined_plan(context, inner, call.causal, call.window)[1]
    shares = HeadShare.of(call.heads, call.kv_heads, inner).queries
    return max(plan.work) * max(last - first for first, last in shares)
