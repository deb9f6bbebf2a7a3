"""Rows with sink tokens: what each row holds, against rules that a reader can check, and against rows without them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_rows import STRIDE, FakeCorpus, lengths_lists, relaxed

from longctx.config.schema import Source
from longctx.data.rows import IGNORE, Rows
from longctx.errors import DataError
from longctx.sequence.layout import LAYOUTS, Run

SINKS = (10**12, 10**12 + 1, 10**12 + 2)


def make(lengths: list[int], length: int, seed: int, sinks: tuple[int, ...] = SINKS) -> Rows:
    return Rows([(FakeCorpus(lengths), Source(path=Path("fake")))], length, seed, sinks=sinks)


@relaxed
@given(lengths=lengths_lists, room=st.integers(1, 40), count=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_piece_begins_with_all_sinks(lengths: list[int], room: int, count: int, seed: int) -> None:
    """A piece is sinks in order and then neighbours of one document; whatever follows another token is its label."""
    sinks = SINKS[:count]
    try:
        rows = make(lengths, count + room, seed, sinks)
    except DataError:
        assert sum(lengths) + count * len(lengths) < room
        return
    seen: list[int] = []
    for row in range(rows.num_rows_per_epoch):
        tokens, labels = rows.read(row, [Run(0, count + room)])
        starts = rows.documents(row)
        assert len(tokens) == len(labels) == count + room and starts[0] == 0
        for start, stop in zip(starts, (*starts[1:], count + room), strict=True):
            piece, own = tokens[start:stop], labels[start:stop]
            head, text = piece[:count], piece[count:]
            assert head.tolist() == list(sinks[: len(head)])
            assert (own[:count] == IGNORE).all() and not np.isin(own, sinks).any()
            if not len(text):
                assert stop == count + room or start == 0  # cut by the row's end, or those that are too many
                continue
            assert (text < SINKS[0]).all() and (np.diff(text) == 1).all()
            known = own[count:] != IGNORE
            assert (own[count:][known] == text[known] + 1).all()
            ends = np.array([token % STRIDE == lengths[token // STRIDE] - 1 for token in text])
            assert (known == ~ends).all()
            seen += text.tolist()
    assert len(seen) == len(set(seen))
    lost = sum(lengths) - len(seen)
    assert 0 <= lost < room  # dropped at the end of an epoch, as ever


@relaxed
@given(data=st.data(), lengths=lengths_lists, degree=st.integers(1, 4), name=st.sampled_from(sorted(LAYOUTS)))
def test_ranks_read_the_row_once(data: st.DataObject, lengths: list[int], degree: int, name: str) -> None:
    length = data.draw(st.integers(4, 3 + max(1, sum(lengths) // 2)))
    rows = make(lengths, length, 5)
    row = data.draw(st.integers(0, 2 * rows.num_rows_per_epoch))
    whole = rows.read(row, [Run(0, length)])
    layout = LAYOUTS[name](length, degree, (rows.documents(row),))
    for rank in range(degree):
        found = rows.read(row, layout.runs[rank])
        for one, other in zip(found, whole, strict=True):
            assert np.array_equal(one, other[layout.indices(rank)])


def test_rows_without_sinks_are_as_they_were() -> None:
    lengths = [5, 9, 30, 1, 17]
    plain, none = Rows([(FakeCorpus(lengths), Source(path=Path("fake")))], 11, 3), make(lengths, 11, 3, ())
    assert plain.num_rows_per_epoch == none.num_rows_per_epoch == sum(lengths) // 11
    for row in range(9):
        assert plain.documents(row) == none.documents(row)
        for one, other in zip(plain.read(row, [Run(0, 11)]), none.read(row, [Run(0, 11)]), strict=True):
            assert np.array_equal(one, other)


def test_rows_of_nothing_but_sinks_are_refused() -> None:
    with pytest.raises(DataError, match="rows of 3 tokens have no room beside 3 sink tokens"):
        make([50], 3, 0)


def test_long_documents_are_those_of_as_many_tokens_of_text() -> None:
    """A document of exactly ``long_documents`` tokens is long, one of a token less is not, with any number of sinks."""
    source = Source(path=Path("fake"), long_documents=10, long_repeat=3)
    rows = Rows([(FakeCorpus([9, 10]), source)], 5, 0, sinks=SINKS)
    assert rows.num_rows_per_epoch == (9 + 3 + 3 * (10 + 3)) // 2
