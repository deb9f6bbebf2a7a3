"""Training rows against a naive reading of the documents.

Every token of the fake corpora says which document and position it is (``document * STRIDE + position``), so the
expected labels and boundaries follow from the tokens alone, without the code's own order.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.schema import Source
from longctx.data.corpus import open_corpus
from longctx.data.mixture import BLOCK, PERIOD, Mixture
from longctx.data.order import DocumentOrder, seeded_permutation
from longctx.data.rows import IGNORE, Rows
from longctx.errors import DataError
from longctx.sequence.layout import LAYOUTS, Run

STRIDE = 1_000_000
GOLDEN = [6, 9, 4, 0, 7, 8, 2, 1, 3, 5]


@dataclass
class FakeCorpus:
    """Documents of given lengths; counts the tokens that are read."""

    lengths: list[int]
    base: int = 0
    tokenizer_fingerprint: str = "t"
    split: str = "train"
    folder: Path = Path("fake")
    tokens_read: int = field(default=0)

    def __post_init__(self) -> None:
        self.offsets = np.cumsum([0, *self.lengths])
        documents = [
            (self.base + index) * STRIDE + np.arange(length, dtype=np.int64)
            for index, length in enumerate(self.lengths)
        ]
        self.content = np.concatenate(documents)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        self.tokens_read += stop - start
        return self.content[start:stop]


def source(weight: float = 1.0, **settings: object) -> Source:
    return Source(path=Path("fake"), weight=weight, **settings)


def make_rows(lengths: list[int], length: int, seed: int, **settings: object) -> Rows:
    shuffle = bool(settings.pop("shuffle", True))
    return Rows([(FakeCorpus(lengths), source(**settings))], length, seed, shuffle=shuffle)


def expected_labels(tokens: np.ndarray, lengths: list[int]) -> list[int]:
    """The next token of the same document, or IGNORE at its last token."""
    return [
        IGNORE if position == lengths[document] - 1 else document * STRIDE + position + 1
        for document, position in (divmod(int(token), STRIDE) for token in tokens)
    ]


lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=30)
relaxed = settings(deadline=None, max_examples=60)


@relaxed
@given(lengths=lengths_lists, length=st.integers(1, 50), seed=st.integers(0, 2**70), shuffle=st.booleans())
def test_an_epoch_holds_every_document_once(lengths: list[int], length: int, seed: int, shuffle: bool) -> None:
    if sum(lengths) < length:
        with pytest.raises(DataError, match=rf"has {sum(lengths)} tokens, fewer than one sequence of {length};"):
            make_rows(lengths, length, seed)
        return
    rows = make_rows(lengths, length, seed, shuffle=shuffle)
    assert rows.num_rows_per_epoch == sum(lengths) // length
    for epoch in range(2):
        stream: list[int] = []
        for row in range(epoch * rows.num_rows_per_epoch, (epoch + 1) * rows.num_rows_per_epoch):
            tokens, labels = rows.read(row, [Run(0, length)])
            assert tokens.dtype == labels.dtype == np.int64
            assert labels.tolist() == expected_labels(tokens, lengths)
            starts = [i for i, token in enumerate(tokens) if i == 0 or token % STRIDE == 0]
            assert list(rows.documents(row)) == starts
            stream += tokens.tolist()
        assert len(set(stream)) == len(stream)
        for before, after in pairwise(stream):
            ends = before % STRIDE == lengths[before // STRIDE] - 1
            assert after % STRIDE == 0 if ends else after == before + 1
        if not shuffle:
            assert stream == sorted(stream)


@relaxed
@given(data=st.data(), lengths=lengths_lists, seed=st.integers(0, 99))
def test_any_runs_of_a_row_equal_the_whole_row(data: st.DataObject, lengths: list[int], seed: int) -> None:
    length = data.draw(st.integers(1, sum(lengths)))
    rows = make_rows(lengths, length, seed)
    row = data.draw(st.integers(0, 3 * rows.num_rows_per_epoch))
    tokens, labels = rows.read(row, [Run(0, length)])
    bounds = st.tuples(st.integers(0, length), st.integers(0, length), st.integers(1, 9))
    runs = data.draw(st.lists(bounds.map(lambda drawn: Run(*sorted(drawn[:2]), drawn[2])), max_size=5))
    got_tokens, got_labels = rows.read(row, runs)
    assert got_tokens.dtype == got_labels.dtype == np.int64
    assert got_tokens.tolist() == [token for run in runs for token in tokens[slice(*run)]]
    assert got_labels.tolist() == [label for run in runs for label in labels[slice(*run)]]


@relaxed
@given(data=st.data(), lengths=lengths_lists, degree=st.integers(1, 5), name=st.sampled_from(sorted(LAYOUTS)))
def test_the_ranks_of_any_layout_read_the_row_once(
    data: st.DataObject, lengths: list[int], degree: int, name: str
) -> None:
    length = data.draw(st.integers(1, sum(lengths)))
    rows = make_rows(lengths, length, 3)
    layout = LAYOUTS[name](length, degree, (rows.documents(0),))
    whole = rows.read(0, [Run(0, length)])
    for rank, runs in enumerate(layout.runs):
        for part, all_ in zip(rows.read(0, runs), whole, strict=True):
            assert part.tolist() == all_[layout.indices(rank)].tolist()


def test_only_the_runs_and_one_more_token_are_read() -> None:
    corpus = FakeCorpus([1000, 50, 3000])
    rows = Rows([(corpus, source())], 2000, seed=0)
    rows.documents(1)
    assert corpus.tokens_read == 0
    rows.read(1, [Run(10, 30), Run(500, 600)])
    assert corpus.tokens_read <= 20 + 1 + 100 + 1


def test_rows_are_a_pure_function_of_seed_and_row() -> None:
    """Access in random order, from fresh objects, equals reading in order."""

    def rows() -> Rows:
        corpora = [FakeCorpus([7, 30, 11, 2] * 5), FakeCorpus([13] * 9, base=500)]
        pairs = [(corpora[0], source(2.0, long_documents=20, long_repeat=1.5)), (corpora[1], source(1.0))]
        return Rows(pairs, 17, seed=5)

    sequential = rows()
    wanted = [sequential.read(row, [Run(0, 17)])[0].tolist() for row in range(3000)]
    random_access = rows()
    for row in np.random.default_rng(0).permutation(3000)[:300]:
        assert random_access.read(int(row), [Run(0, 17)])[0].tolist() == wanted[row]
    assert rows().read(2999, [Run(0, 17)])[0].tolist() == wanted[2999]


def test_seeds_epochs_and_sources_give_different_orders() -> None:
    orders = [
        tuple(DocumentOrder(np.full(50, 3), seed, source, True).epoch(epoch).documents.tolist())
        for seed in (0, 1)
        for source in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 8
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_orders_never_change_between_versions() -> None:
    """A resumed run must read what it would have read: these values are part of the format."""
    assert seeded_permutation(10, 1, 2, 3, 4).tolist() == GOLDEN
    assert seeded_permutation(10, 1 + 2**64, 2, 3, 4).tolist() == GOLDEN


@relaxed
@given(
    lengths=st.lists(st.integers(1, 60), min_size=3, max_size=40),
    threshold=st.integers(1, 60),
    repeat=st.floats(1, 4),
    seed=st.integers(0, 99),
)
def test_long_documents_are_repeated(lengths: list[int], threshold: int, repeat: float, seed: int) -> None:
    order = DocumentOrder(np.array(lengths), seed, 0, True, threshold, repeat)
    long_tokens = sum(length for length in lengths if length >= threshold)
    longest = max(lengths)
    for index in range(3):
        epoch = order.epoch(index)
        times = np.bincount(epoch.documents, minlength=len(lengths))
        for length, count in zip(lengths, times, strict=True):
            if length < threshold:
                assert count == 1
            else:
                assert int(repeat) <= count <= int(repeat) + 1
        assert epoch.starts.tolist() == np.cumsum([0, *(lengths[d] for d in epoch.documents)]).tolist()
        surplus = epoch.starts[-1] - (sum(lengths) + (repeat - 1) * long_tokens)
        assert -1 < surplus < longest
        assert order.tokens_per_epoch <= epoch.starts[-1] < order.tokens_per_epoch + longest


def test_the_fraction_of_repeats_falls_on_other_documents_in_other_epochs() -> None:
    order = DocumentOrder(np.full(40, 10), 0, 0, True, 5, 1.25)
    repeated = [frozenset(np.flatnonzero(np.bincount(order.epoch(index).documents) == 2)) for index in range(4)]
    assert {len(chosen) for chosen in repeated} == {10}
    assert len(set(repeated)) == 4


@relaxed
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_mixture_has_exact_proportions_and_consecutive_counters(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed)
    shares = np.array(weights) / sum(weights)
    next_row = [0] * len(weights)
    for block in range(3):
        counts = [0] * len(weights)
        for row in range(block * BLOCK, (block + 1) * BLOCK):
            chosen, counter = mixture.locate(row)
            assert counter == next_row[chosen]
            next_row[chosen] += 1
            counts[chosen] += 1
        assert (np.abs(counts - shares * BLOCK) < 1 + 1 / PERIOD).all()


def test_mixture_counters_far_into_a_run() -> None:
    """Any row can be located alone: counters continue over many periods and shares do not drift."""
    weights = [0.7, 0.2999, 0.0001]
    mixture = Mixture(weights, seed=3)
    block = 5 * PERIOD - 1
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for row in range(block * BLOCK, (block + 2) * BLOCK):
        chosen, counter = mixture.locate(row)
        seen[chosen].append(counter)
    for chosen, counters in seen.items():
        assert np.diff(counters).tolist() == [1] * (len(counters) - 1) if chosen < 2 else len(counters) <= 1
        if chosen < 2:
            assert abs(counters[0] - weights[chosen] * block * BLOCK) < 2 + block / PERIOD
    order = [mixture.locate(row)[0] for row in range(BLOCK)]
    assert order != sorted(order) and order != [mixture.locate(row)[0] for row in range(BLOCK, 2 * BLOCK)]


def test_small_weights_are_read_in_time_or_refused() -> None:
    mixture = Mixture([1.0, 0.0001], seed=0)
    assert {mixture.locate(row)[0] for row in range(PERIOD * BLOCK)} == {0, 1}
    with pytest.raises(DataError, match="weight 1e-07"):
        Mixture([1.0, 1e-7], seed=0)


def test_rows_of_a_mixture_come_from_their_sources() -> None:
    corpora = [FakeCorpus([7] * 30), FakeCorpus([5] * 30, base=100)]
    rows = Rows([(corpora[0], source(3.0)), (corpora[1], source(1.0))], 12, seed=1)
    firsts = np.array([rows.read(row, [Run(0, 12)])[0] // STRIDE >= 100 for row in range(BLOCK)])
    assert (firsts.all(axis=1) | ~firsts.any(axis=1)).all()
    assert firsts[:, 0].sum() == BLOCK // 4
    assert rows.num_rows_per_epoch == 30 * 7 // 12 + 30 * 5 // 12


def test_sources_that_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="different tokenizers"):
        Rows([(FakeCorpus([9]), source()), (FakeCorpus([9], tokenizer_fingerprint="u"), source())], 4, 0)
    with pytest.raises(DataError, match="no data source"):
        Rows([], 4, 0)
    with pytest.raises(DataError, match="larger --holdout"):
        Rows([(FakeCorpus([9], split="valid"), source())], 10, 0)


def test_rows_of_a_built_corpus(build: object, texts_folder: Path, tmp_path: Path) -> None:
    """Without shuffling, the rows laid end to end are the documents in the order of the shards."""
    folder = build([texts_folder], tmp_path / "corpus", shard_bytes=1000)  # type: ignore[operator]
    corpus = open_corpus(folder)
    assert len(corpus.shards) > 3
    rows = Rows([(corpus, source())], 64, 0, shuffle=False)
    stream = np.concatenate([rows.read(row, [Run(0, 64)])[0] for row in range(rows.num_rows_per_epoch)])
    bins = [np.fromfile(folder / f"{shard.name}.bin", "<u2") for shard in corpus.shards]
    assert stream.tolist() == np.concatenate(bins)[: len(stream)].tolist()


def test_a_million_documents_are_ordered_each_as_often_as_asked() -> None:
    lengths = np.random.default_rng(0).integers(10, 5000, 1_000_000)
    epoch = DocumentOrder(lengths, 0, 0, True, 3000, 2.5).epoch(0)
    times = np.bincount(epoch.documents, minlength=len(lengths))
    assert (times[lengths < 3000] == 1).all() and set(times[lengths >= 3000].tolist()) == {2, 3}
    assert (np.diff(epoch.starts) == lengths[epoch.documents]).all()
