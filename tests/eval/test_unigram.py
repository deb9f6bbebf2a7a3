"""Unigram entropy against naive loops and closed forms."""

import math
from collections import Counter

import numpy as np
import pytest
from eval_fakes import ArrayCorpus

from longctx.eval.unigram import cross_entropy, entropy, token_counts, unigram


def naive_entropy(tokens: list[int]) -> float:
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())


def naive_cross_entropy(train: list[int], heldout: list[int], vocab_size: int) -> float:
    counts = Counter(train)
    return -sum(math.log((counts[t] + 1) / (len(train) + vocab_size)) for t in heldout) / len(heldout)


def test_against_naive_loops() -> None:
    generator = np.random.default_rng(20260101)
    train = (generator.zipf(1.5, 5003) % 97).tolist()
    heldout = (generator.zipf(1.5, 701) % 101).tolist()
    result = unigram(ArrayCorpus([train[:11], train[11:]], 101), ArrayCorpus([heldout], 101))
    assert result["entropy"] == pytest.approx(naive_entropy(train), abs=1e-12)
    assert result["heldout_cross_entropy"] == pytest.approx(naive_cross_entropy(train, heldout, 101), abs=1e-12)
    assert (result["train_tokens"], result["heldout_tokens"], result["vocab_size"]) == (5003, 701, 101)


def test_closed_forms() -> None:
    assert entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4), abs=1e-15)
    assert entropy(np.array([0, 9, 0])) == 0.0
    assert entropy(np.zeros(3, np.int64)) == 0.0
    # No training token at all: add-one smoothing is the uniform distribution.
    assert cross_entropy(np.zeros(8, np.int64), np.array([0, 3, 0, 0, 1, 0, 0, 0])) == pytest.approx(
        math.log(8), abs=1e-15
    )


def test_no_held_out_text() -> None:
    assert unigram(ArrayCorpus([[1, 2]], 5), ArrayCorpus([], 5))["heldout_cross_entropy"] is None


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_do_not_change_counts(block: int) -> None:
    corpus = ArrayCorpus([list(range(10)) * 13, [3] * 5], 12)
    expected = [13, 13, 13, 18, 13, 13, 13, 13, 13, 13, 0, 0]
    assert token_counts(corpus, block=block).tolist() == expected


def test_limit_reads_a_part_from_all_over_the_stream() -> None:
    corpus = ArrayCorpus([[token] * 10 for token in range(10)], 10)
    counts = token_counts(corpus, limit=50, block=10)
    assert counts.sum() == 50
    assert counts.tolist() == [10, 0] * 5
