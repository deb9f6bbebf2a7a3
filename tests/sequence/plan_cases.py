"""Random plans, and a brute-force mask of what they let each rank see."""

from typing import Any

import numpy as np
from attention_cases import visible
from hypothesis import strategies as st

from longctx.sequence.layout import LAYOUTS, Documents
from longctx.sequence.plan import AttentionPlan, Slice


@st.composite
def plans(draw: Any, cross: bool = False) -> AttentionPlan:
    length, degree = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    starts = st.sets(st.integers(0, length - 1), max_size=6).map(lambda extra: tuple(sorted({0, *extra})))
    documents: Documents = tuple(draw(st.lists(starts, min_size=1, max_size=3)))
    window = draw(st.one_of(st.none(), st.integers(1, length + 2)))
    names = st.sampled_from(sorted(LAYOUTS))
    queries, keys = (LAYOUTS[draw(names)](length, degree, documents) for _ in range(2))
    return AttentionPlan(queries if cross else keys, keys, documents, draw(st.booleans()), window)


def painted(slices: tuple[Slice, ...], rows: int, columns: int) -> np.ndarray:
    """How often each pair of local query and key is computed."""
    count = np.zeros((rows, columns), dtype=int)
    for s in slices:
        height, width = s.q_end - s.q_start, s.k_end - s.k_start
        assert 0 <= s.q_start < s.q_end <= rows and 0 <= s.k_start < s.k_end <= columns, s
        block = np.ones((height, width), dtype=int)
        if s.mask != "full":
            assert height == width, s
            block = np.tril(block) if s.mask == "causal" else np.triu(block)
        count[s.q_start : s.q_end, s.k_start : s.k_end] += block
    return count


def expected(plan: AttentionPlan, rank: int, source: int) -> np.ndarray:
    """The same from the definition; rows of the batch never see each other."""
    rows, columns = plan.queries.sizes[rank], plan.keys.sizes[source]
    whole = np.zeros((len(plan.documents) * rows, len(plan.documents) * columns), dtype=int)
    index = np.ix_(plan.queries.indices(rank), plan.keys.indices(source))
    for b, starts in enumerate(plan.documents):
        seen = visible(starts, plan.queries.length, plan.causal, plan.window)
        whole[b * rows : (b + 1) * rows, b * columns : (b + 1) * columns] = seen[index]
    return whole
