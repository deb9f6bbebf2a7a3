"""Which heads a rank gets, for head counts that divide nothing."""

from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.ulysses import HeadShare


@settings(max_examples=300)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 12))
def test_every_query_head_goes_to_one_rank_with_the_kv_head_it_reads(kv_heads: int, group: int, size: int) -> None:
    heads = kv_heads * group
    share = HeadShare.of(heads, kv_heads, size)
    given_out = [head for first, last in share.queries for head in range(first, last)]
    assert given_out == list(range(heads))
    counts = [last - first for first, last in share.queries]
    assert max(counts) - min(counts) <= 1
    for (first, last), (kv_first, kv_last), index in zip(share.queries, share.keys, share.index, strict=True):
        if first == last:
            assert kv_first == kv_last and index == ()
            continue
        # A kernel reads query heads in equal groups, the n-th of them with the n-th kv head.
        width, rest = divmod(last - first, len(index))
        assert rest == 0
        read = [kv_first + index[(head - first) // width] for head in range(first, last)]
        assert read == [head // group for head in range(first, last)]
        assert set(read) == set(range(kv_first, kv_last))


def test_whole_groups_need_no_copies_of_kv_heads() -> None:
    assert HeadShare.of(8, 2, 2) == HeadShare(((0, 4), (4, 8)), ((0, 1), (1, 2)), ((0,), (0,)))
    # Three query heads over two kv heads of two each: the second rank's first head reads the first kv head.
    assert HeadShare.of(4, 2, 4).keys == ((0, 1), (0, 1), (1, 2), (1, 2))
    assert HeadShare.of(6, 2, 4).index == ((0,), (0,), (0,), (0,))
