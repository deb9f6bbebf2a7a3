"""``longctx bench neighbours``: what an index of nearest keys finds, and a step over it against a step over all keys.

Keys lie around centres, and every query near one of them, as those of trained heads do more than random ones: a known
input, not a model's. What is found is compared with brute force.

Legend: N keys, Q queries, E head dim, L centres.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from longctx.attention.kernels import Scoring
from longctx.cache.attend import attend
from longctx.cache.neighbours import Neighbours, recall
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import RaggedKV

_CENTRES, _QUERIES, _SIZE = 256, 64, 64


@dataclass(frozen=True)
class Found:
    """One cache of one head.

    Args:
        recall: share of the nearest keys that were found, a mean over queries.
        mass: share of the softmax that the attended keys hold, a mean over queries.
        build_s: of the index of all keys.
        step_s, dense_s: of one query over the index and over all keys, medians.
    """

    length: int
    count: int
    recall: float
    mass: float
    build_s: float
    step_s: float
    dense_s: float


def clustered(keys: int, queries: int, size: int, seed: int, centres: int = 64) -> tuple[Tensor, Tensor]:
    """Keys [N, E] around centres, of lengths that differ, and queries [Q, E] near some of the centres; fp32."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centre_LE = 2 * drawn(centres, size)
    near_N = torch.randint(centres, (keys,), generator=generator)
    near_Q = torch.randint(centres, (queries,), generator=generator)
    length_N1 = 0.75 + 0.5 * torch.rand(keys, 1, generator=generator)
    return (centre_LE[near_N] + drawn(keys, size)) * length_N1, centre_LE[near_Q] + drawn(queries, size)


@torch.no_grad()
def neighbours(
    lengths: Sequence[int], count: int, rounds: int, advance_to: Callable[[str], None] = lambda _: None
) -> list[Found]:
    """Measure every length."""
    found, search = [], Neighbours(count)
    for length in lengths:
        advance_to(f"{length:,} keys")
        k_NE, q_QE = clustered(length, _QUERIES, _SIZE, seed=0, centres=_CENTRES)
        kv_1N1E, at = k_NE[None, :, None], torch.arange(length)[None]
        empty = RaggedKV.empty(1, 1, _SIZE, k_NE, CacheOptions(search=search))
        dense = RaggedKV.empty(1, 1, _SIZE, k_NE).append(kv_1N1E, kv_1N1E, at)
        started = time.perf_counter()
        cache = empty.append(kv_1N1E, kv_1N1E, at).attended(None)
        build_s = time.perf_counter() - started
        masses, times = _steps(q_QE, cache, dense, rounds)
        found.append(Found(length, count, recall(k_NE, q_QE, search), masses, build_s, *times))
    return found


def _steps(q_QE: Tensor, cache: RaggedKV, dense: RaggedKV, rounds: int) -> tuple[float, tuple[float, float]]:
    """Mean share of the softmax, from the log-sum-exps of both, and seconds of a query over either."""
    scoring, at = Scoring(_SIZE**-0.5, None), torch.tensor([[cache.seen - 1]])
    shares: list[float] = []
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for q_E in q_QE:
            sums = []
            for place, own in enumerate((cache, dense)):
                started = time.perf_counter()
                _, lse = attend(q_E[None, None, None], own, at, scoring)
                seconds[place].append(time.perf_counter() - started)
                sums.append(float(lse))
            shares.append(torch.tensor(sums[0] - sums[1]).exp().item())
    return sum(shares) / len(shares), (median(seconds[0]), median(seconds[1]))


def table(found: Sequence[Found]) -> list[str]:
    """The results as lines of text."""
    head = "| keys | nearest | recall | share of the softmax | index, s | step, ms | all keys, ms |"
    lines = [head, "|---" * 7 + "|"]
    for row in found:
        lines.append(
            f"| {row.length:,} | {row.count} | {row.recall:.3f} | {row.mass:.3f} | {row.build_s:.2f} | "
            f"{1e3 * row.step_s:.2f} | {1e3 * row.dense_s:.2f} |"
        )
    return lines
