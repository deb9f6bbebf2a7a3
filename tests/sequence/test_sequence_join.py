"""Joined layouts: groups of ranks hold what their ranks hold, in few runs, for every layout and degree."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.sequence.join import join
from longctx.sequence.layout import LAYOUTS, Layout, zigzag


@st.composite
def layouts(draw: Any) -> tuple[Layout, int]:
    length, inner, outer = draw(st.integers(1, 60)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    starts = draw(st.sets(st.integers(0, length - 1), max_size=5))
    documents = (tuple(sorted({0, *starts})),)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](length, inner * outer, documents), inner


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_a_group_holds_its_ranks_tokens_in_the_order_it_says(case: tuple[Layout, int]) -> None:
    layout, inner = case
    joined = join(layout, inner)
    assert joined.layout.degree * inner == layout.degree
    for group in range(joined.layout.degree):
        ranks = range(group * inner, (group + 1) * inner)
        tokens = np.concatenate([layout.indices(rank) for rank in ranks])
        order, back = joined.order[group], joined.back[group]
        arranged = tokens if order is None else tokens[order]
        assert (arranged == joined.layout.indices(group)).all()
        assert (tokens == (arranged if back is None else arranged[back])).all()
        assert len(joined.layout.runs[group]) <= sum(len(layout.runs[rank]) for rank in ranks)


def test_all_ranks_together_hold_one_run() -> None:
    for make in LAYOUTS.values():
        layout = make(97, 6, ((0, 11, 60),))
        assert join(layout, 6).layout.runs == (((0, 97, 1),),)


def test_one_rank_is_a_group_of_itself() -> None:
    layout = zigzag(40, 4)
    assert join(layout, 1).layout == layout and set(join(layout, 1).order) == {None}
