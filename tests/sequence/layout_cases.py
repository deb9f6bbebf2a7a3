"""Layouts that hardly happen."""

from itertools import pairwise

import numpy as np

from longctx.sequence.layout import LAYOUTS, Layout, Run


def layouts(world: int, seed: int) -> list[Layout]:
    """Even, uneven and empty shards; runs that a rank has in any order."""
    generator = np.random.default_rng(seed)
    cuts = [0, *sorted(int(c) for c in generator.integers(0, 18, 2 * world)), 17]
    runs: list[list[Run]] = [[] for _ in range(world)]
    for start, stop in pairwise(cuts):
        if start < stop:
            runs[int(generator.integers(world))].insert(0, Run(start, stop))
    named = [LAYOUTS[name](length, world) for name in ("contiguous", "zigzag") for length in (13, 2)]
    backwards = Layout(world * 2, tuple((Run(2 * p, 2 * p + 2),) for p in reversed(range(world))))
    return [*named, backwards, Layout(17, tuple(map(tuple, runs)))]
