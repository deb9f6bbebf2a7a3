"""What is packed to travel: the rows of a part as the whole block packs them, and what comes home added to them."""

import pytest
import torch

from longctx.attention.travel import (
    QueryBlock,
    Schedules,
    add_part_,
    pack_keys,
    pack_queries,
    queries_travel,
    unpack_queries,
)
from longctx.sequence.layout import contiguous
from longctx.sequence.parts import Part
from longctx.sequence.plan import AttentionPlan

ROWS = 11
WHOLE = Part(((0, ROWS),), ROWS)
PARTS = (WHOLE, Part((), ROWS), Part(((3, 7),), ROWS), Part(((0, 1), (4, 8), (10, 11)), ROWS))
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def rows_of(part: Part) -> list[int]:
    return [row for start, stop in part.ranges for row in range(start, stop)]


def queries_of(dtype: torch.dtype) -> QueryBlock:
    wide = torch.promote_types(dtype, torch.float32)
    dout, q, out = (torch.randn(ROWS, 3, 5, dtype=torch.float64).to(dtype) for _ in range(3))
    return QueryBlock(dout, q, out, torch.randn(ROWS, 3, dtype=wide))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.ranges))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_part_are_packed_as_those_of_the_whole(part: Part, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(ROWS, 2, 4, dtype=torch.float64).to(dtype) for _ in range(2))
    assert torch.equal(pack_keys(k, v, part), torch.stack((k, v), dim=1)[rows_of(part)])
    block = queries_of(dtype)
    packed = pack_queries(block, part)
    assert torch.equal(packed, pack_queries(block, WHOLE)[rows_of(part)])
    dout, q, out, lse = unpack_queries(packed, block)
    for found, wanted in zip((dout, q, lse), (block.dout_NHE, block.q_NHE, block.lse_NH), strict=True):
        assert torch.equal(found, wanted[rows_of(part)])
    if dtype == torch.float64:
        torch.testing.assert_close((dout * out).sum(-1), (block.dout_NHE * block.out_NHE).sum(-1)[rows_of(part)])


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.ranges))
def test_what_comes_home_is_added_to_the_rows_that_left(part: Part) -> None:
    block, arrived = torch.randn(ROWS, 2, 3), torch.randn(part.size, 2, 3)
    wanted = block.clone()
    wanted[rows_of(part)] += arrived
    found = add_part_(block, arrived, part)
    assert found is block and torch.equal(found, wanted)
    assert torch.equal(add_part_(block, None, part), wanted)


def test_hops_decide_what_travels() -> None:
    """Without grouped heads queries are fewer bytes a row, but in a contiguous layout they pass ranks before them.

    Keys of rank s go to the P - 1 - s ranks after it; queries reach the first rank by way of the last.
    """
    layout = contiguous(64, 8)
    causal, everything = (Schedules(AttentionPlan(layout, layout, ((0,),), flag)) for flag in (True, False))
    assert causal.key_rows == (8 * 28, 8 * 28)
    assert causal.query_rows == (8 * 7 * 7, 8 * 28)
    assert everything.key_rows == everything.query_rows == (8 * 56, 8 * 56)
    assert queries_travel(everything, 4, 4, 64, torch.float32)
    assert not queries_travel(causal, 4, 4, 64, torch.float32)
