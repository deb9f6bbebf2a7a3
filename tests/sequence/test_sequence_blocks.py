"""Blocks of packed rows on any layout, against their definition token by token. Integers only."""

from itertools import pairwise

import numpy as np
import pytest

from longctx.errors import UnsupportedError
from longctx.runtime.mesh import Group
from longctx.sequence.blocks import Blocks, blocks_of
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import LAYOUTS, Documents, Layout, Run

NONE = -1


def context_of(layout: Layout, documents: Documents, rank: int) -> SequenceContext:
    return SequenceContext(Group(rank, tuple(range(layout.degree))), layout, documents)


def random_layout(generator: np.random.Generator, length: int, degree: int) -> Layout:
    """Runs of any size, some ranks without any, in any order."""
    cuts = sorted({0, length, *(int(c) for c in generator.integers(0, length + 1, 3 * degree))})
    runs: list[list[Run]] = [[] for _ in range(degree)]
    for a, b in pairwise(cuts):
        runs[int(generator.integers(degree))].insert(0, Run(a, b))
    return Layout(length, tuple(map(tuple, runs)))


def random_documents(generator: np.random.Generator, rows: int, length: int) -> Documents:
    return tuple(tuple(sorted({0, *(int(s) for s in generator.integers(0, length, 3))})) for _ in range(rows))


def place(documents: tuple[int, ...], token: int) -> tuple[int, int]:
    """Document of a token and its position there."""
    number = int(np.searchsorted(documents, token, side="right")) - 1
    return number, token - documents[number]


def assert_by_definition(found: Blocks, layout: Layout, documents: Documents, rank: int, size: int) -> None:
    length, starts = layout.length, found.tokens.documents[0]
    assert starts == tuple(row * length + s for row, own in enumerate(documents) for s in own)
    ends = (*starts[1:], len(documents) * length)
    # All full blocks by their tokens, in order.
    full = [
        range(a + b * size, a + (b + 1) * size)
        for a, e in zip(starts, ends, strict=True)
        for b in range((e - a) // size)
    ]
    own = [row * length + t for row in range(len(documents)) for t in layout.indices(rank)]
    tokens = np.array([*own, *found.tokens_wanted[rank], NONE])
    owned = set(own)
    mine = [number for number, block in enumerate(full) if block[-1] in owned]
    held = list(found.blocks.layout.indices(rank))
    assert sorted(held) == (mine if full else [0] * (rank == 0))
    assert [list(tokens[row]) for row in found.of_blocks_NC] == [list(full[b]) if full else [NONE] * size for b in held]
    blocks = [NONE, *held, *found.blocks_wanted[rank]]
    for token, output in zip(own, found.outputs_T, strict=True):
        document, position = place(starts, token)
        group, inside = divmod(int(output), size)
        block, wanted = divmod(position + 1, size)
        assert inside == wanted  # position 0: the prefix alone
        before = blocks[found.before_G[group]]
        first = starts[document] + block * size
        assert before == NONE if block == 0 else full[before][-1] == first - 1
        assert list(tokens[found.of_groups_GC[group][:inside]]) == list(range(first, token + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_rank_finds_its_blocks_and_what_it_lacks(size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for _ in range(20):
        length, degree = int(generator.integers(1, 40)), int(generator.integers(1, 5))
        documents = random_documents(generator, int(generator.integers(1, 4)), length)
        named = [LAYOUTS[name](length, degree, documents) for name in ("contiguous", "zigzag", "balanced")]
        for layout in [*named, random_layout(generator, length, degree)]:
            for rank in range(degree):
                found = blocks_of(context_of(layout, documents, rank), size)
                assert_by_definition(found, layout, documents, rank, size)


def test_runs_of_whole_blocks_lack_one_block_each() -> None:
    layout = LAYOUTS["zigzag"](32, 2)
    found = blocks_of(context_of(layout, ((0,),), 0), 4)
    assert [list(t) for t in found.tokens_wanted] == [[], []]
    assert [list(b) for b in found.blocks_wanted] == [[5], [1]]
    assert found.blocks.layout == LAYOUTS["zigzag"](8, 2)


def test_a_document_counts_its_blocks_from_its_start() -> None:
    found = blocks_of(context_of(LAYOUTS["contiguous"](20, 1), ((0, 3, 13), (0, 19)), 0), 4)
    # Documents of 3, 10, 7, 19 and 1 tokens.
    assert found.blocks.documents == ((0, 2, 3),)
    assert found.of_blocks_NC[:, 0].tolist() == [3, 7, 13, 20, 24, 28, 32]


def test_torn_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="use a layout other than striped"):
        blocks_of(context_of(LAYOUTS["striped"](20, 2), ((0,),), 0), 4)
