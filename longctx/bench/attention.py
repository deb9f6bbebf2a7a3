"""``longctx bench attention``: every scheme against one process with all threads, and against DeepSpeed's Ulysses."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from longctx.bench.crew import Crew
from longctx.bench.problem import DEEPSPEED, OURS, PACKED, SINGLE, Shape, context_of
from longctx.errors import UnsupportedError
from longctx.runtime.mesh import folded


@dataclass(frozen=True)
class Row:
    """One contender. All figures are medians over rounds of ratios within a round.

    Args:
        efficiency_vs_single: seconds of one process with as many threads as there are ranks, divided by the slowest
            rank's; 1 is perfect.
        ratio_vs_deepspeed_ulysses: DeepSpeed's seconds divided by the slowest rank's; above 1 is faster than DeepSpeed.
        time_per_pair_vs_ring: seconds per unmasked query-key pair, relative to the ring on one document.
        extra_memory_ratio: peak memory of a rank beyond its q, k, v and dout, relative to q, k, v, out and all their
            gradients.
    """

    contender: str
    efficiency_vs_single: float
    ratio_vs_deepspeed_ulysses: float | None
    time_per_pair_vs_ring: float | None
    extra_memory_ratio: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """What was measured, where and how."""

    shape: Shape
    ranks: int
    inner: int
    rounds: int
    torch: str
    processor: str
    cores: int
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def contenders(ranks: int, inner: int, shape: Shape) -> list[str]:
    """What can be measured on ``ranks`` ranks: schemes that differ there, the packed ring, DeepSpeed where it runs."""
    two_dimensional = 1 < inner < ranks
    found = [s for s in OURS if two_dimensional or s not in ("hybrid", "double_ring")]
    found.append(PACKED)
    # DeepSpeed needs equal shards and, to split them the way its kernel then groups them, kv heads for every rank.
    if shape.length % ranks == 0 and shape.kv_heads % ranks == 0:
        found.append(DEEPSPEED)
    return found


def bench(
    shape: Shape, ranks: int, rounds: int, inner: int, only: Sequence[str] = (),
    advance: Callable[[str], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Measure contenders, all or ``only`` some, in turns, ``rounds`` times.

    In its turn each computes about as many query-key pairs: a short measurement would mostly be its own start.

    Raises:
        UnsupportedError: fewer than two ranks, ``inner`` does not divide them, or no such contender on them.
    """
    if ranks < 2 or ranks % inner:
        raise UnsupportedError(
            f"a benchmark of {ranks} ranks in groups of {inner}; use 2 or more, in groups that divide"
        )
    known = contenders(ranks, inner, shape)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise UnsupportedError(f"cannot measure {', '.join(unknown)} on {ranks} ranks; choose from {', '.join(known)}")
    names = list(only) or known
    times: dict[str, list[float]] = {name: [] for name in (SINGLE, *names)}
    memory: dict[str, float] = {}
    runs = {PACKED: round(1 / _packed_share(shape, ranks))}
    with Crew(ranks, inner) as crew:
        for _ in range(rounds):
            for name in times:
                advance(name)
                order = {"contender": name, "shape": asdict(shape), "runs": runs.get(name, 1)}
                answer = crew.single(order) if name == SINGLE else crew.world(order)
                times[name].append(answer["seconds"])
                memory.setdefault(name, answer.get("extra_bytes", 0.0))
    rows = tuple(_row(name, times, memory[name], shape, ranks) for name in names)
    processor = platform.processor() or platform.machine()
    return Report(shape, ranks, inner, rounds, torch.__version__, processor, os.cpu_count() or 0, rows)


def _row(name: str, times: Mapping[str, Sequence[float]], memory: float, shape: Shape, ranks: int) -> Row:
    efficiencies = _ratios(times[SINGLE], times[name])
    if name == PACKED:
        # One process would have to do less work too: compare work for work.
        share = _packed_share(shape, ranks)
        efficiencies = [e * share for e in efficiencies]
    deepspeed = _ratios(times[DEEPSPEED], times[name]) if DEEPSPEED in times and name != PACKED else None
    per_pair = None
    if name == PACKED:
        per_pair = median(_ratios(times[name], times["ring"])) / share if "ring" in times else None
    return Row(
        name, median(efficiencies), None if deepspeed is None else median(deepspeed), per_pair,
        memory / shape.local_bytes(-(-shape.length // ranks)), (min(efficiencies), max(efficiencies)),
    )  # fmt: skip


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def _packed_share(shape: Shape, ranks: int) -> float:
    """Query-key pairs of the packed documents, relative to one document."""
    packed, ring = (sum(context_of(shape, name, folded(0, ranks, 1)).plan().work) for name in (PACKED, "ring"))
    return packed / ring


def table(report: Report) -> list[str]:
    """The report as lines of text."""
    shape = report.shape
    head = (
        f"{report.ranks} ranks x 1 thread against 1 process x {report.ranks} threads, fp32, S = {shape.length:,}, "
        f"{shape.heads} heads, {shape.kv_heads} kv heads, E = {shape.head_dim}, causal, forward + backward, "
        f"medians of {report.rounds} interleaved rounds"
    )
    columns = ("scheme", "efficiency vs single", "vs DeepSpeed Ulysses", "time per pair vs ring", "extra memory")
    lines = [head, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in report.rows:
        low, high = row.spread
        lines.append(
            f"| {row.contender} | {row.efficiency_vs_single:.2f} ({low:.2f} to {high:.2f}) | "
            f"{_cell(row.ratio_vs_deepspeed_ulysses)} | {_cell(row.time_per_pair_vs_ring)} | "
            f"{row.extra_memory_ratio:.2f} |"
        )
    return lines


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"
