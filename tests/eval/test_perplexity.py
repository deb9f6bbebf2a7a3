"""Perplexity by position: exact against known models, independent of sharding."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from eval_fakes import ArrayCorpus, SuccessorModel, SuccessorRows

from longctx.errors import LongctxError
from longctx.eval.perplexity import by_position, context_gain
from longctx.runtime.mesh import Group, Mesh, alone
from longctx.sequence.layout import LAYOUTS, Run

V = 11
LENGTH = 97
STARTS = [(0, 5, 6, 40), (0,), (0, 96)]


def of_position(positions_BT: torch.Tensor) -> torch.Tensor:
    return 1 / (2 + positions_BT.double())


def letters(ids: list[int]) -> str:
    return "".join("abcdefghijé"[token] for token in ids)


def shard_mesh(rank: int, degree: int) -> Mesh:
    """Rank ``rank`` of ``degree`` without a process group: what it would contribute before the reduction."""
    one = Group(0, (0,))
    return Mesh(one, one, Group(rank, tuple(range(degree))), torch.device("cpu"))


def naive_bins() -> dict[int, list[float]]:
    """NLL of every target by ceil(log2(preceding tokens)), by plain loops."""
    bins: dict[int, list[float]] = {}
    for starts in STARTS:
        for start, stop in zip(starts, (*starts[1:], LENGTH), strict=True):
            for position in range(stop - start):
                if start + position + 1 in starts:
                    continue
                bins.setdefault(math.ceil(math.log2(position + 1)), []).append(math.log(2 + position))
    return bins


def score(mesh: Mesh, **options: Any) -> dict[str, Any]:
    model = SuccessorModel(V, of_position)
    return by_position(model, SuccessorRows(LENGTH, STARTS, V), len(STARTS), mesh, letters, **options)


def test_known_probabilities_give_exact_perplexity_by_bin() -> None:
    result, expected = score(alone()), naive_bins()
    assert [(entry["start"], entry["stop"]) for entry in result["bins"]] == [
        (1, 2), (2, 3), (3, 5), (5, 9), (9, 17), (17, 33), (33, 65), (65, 129)
    ]  # fmt: skip
    for k, entry in enumerate(result["bins"]):
        assert entry["count"] == len(expected[k])
        loss = math.fsum(expected[k]) / len(expected[k])
        assert entry["loss"] == pytest.approx(loss, abs=1e-12)
        assert entry["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    everything = [nll for values in expected.values() for nll in values]
    assert result["tokens"] == len(everything)
    assert result["loss"] == pytest.approx(math.fsum(everything) / len(everything), abs=1e-12)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-12)


def test_bits_per_byte_counts_the_bytes_of_the_targets() -> None:
    result = score(alone())
    rows = SuccessorRows(LENGTH, STARTS, V)
    labels = [label for row in range(len(STARTS)) for label in rows.read(row, [Run(0, LENGTH)])[1] if label >= 0]
    expected = sum(2 if label == 10 else 1 for label in labels)
    assert result["bytes"] == expected
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * len(labels) / math.log(2) / expected, rel=1e-12)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("degree", [2, 3, 8, 101])
def test_shards_add_up_to_the_whole(degree: int, layout: str) -> None:
    whole = {entry["start"]: entry for entry in score(alone())["bins"]}
    sums, counts = dict.fromkeys(whole, 0.0), dict.fromkeys(whole, 0)
    for rank in range(degree):
        if all(LAYOUTS[layout](LENGTH, degree, (starts,)).sizes[rank] == 0 for starts in STARTS):
            continue
        for entry in score(shard_mesh(rank, degree), layout=layout)["bins"]:
            sums[entry["start"]] += entry["nll"]
            counts[entry["start"]] += entry["count"]
    assert counts == {start: entry["count"] for start, entry in whole.items()}
    for start, entry in whole.items():
        assert sums[start] == pytest.approx(entry["nll"], abs=1e-10)


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    model = SuccessorModel(V, of_position)
    rows = SuccessorRows(LENGTH, STARTS, V)
    small = by_position(model, rows, 3, alone(), letters, chunk=13)
    assert model.widest_logits == 13
    assert small["loss"] == pytest.approx(score(alone())["loss"], abs=1e-13)


def test_advance_is_called_once_per_row() -> None:
    calls: list[None] = []
    score(alone(), advance=lambda: calls.append(None))
    assert len(calls) == len(STARTS)


def test_loss_that_is_not_finite_is_an_error() -> None:
    model = SuccessorModel(V, lambda positions_BT: positions_BT.double() * math.nan)
    with pytest.raises(LongctxError, match="held-out loss is nan"):
        by_position(model, SuccessorRows(LENGTH, STARTS, V), 1, alone(), letters)


def successors(start: int, count: int) -> list[int]:
    return [(start + index) % V for index in range(count)]


def test_gain_scores_the_same_targets_behind_each_context() -> None:
    corpus = ArrayCorpus([successors(0, 30), successors(3, 400), successors(5, 258)], V)
    model = SuccessorModel(V, of_position)
    gain = context_gain(model, corpus, 256, 4, 0, alone())
    assert gain is not None
    targets = 64
    assert (gain["targets"], gain["windows"]) == (2 * targets, 2)
    assert [point["context"] for point in gain["curve"]] == [16, 32, 64, 128, 193]
    for point in gain["curve"]:
        # The first target is predicted at position context - 1 of what is left of the window.
        losses = [math.log(2 + position) for position in range(point["context"] - 1, point["context"] - 1 + targets)]
        assert point["loss"] == pytest.approx(math.fsum(losses) / targets, abs=1e-12)


def test_gain_targets_do_not_depend_on_the_context() -> None:
    """A model whose probability depends on the token alone must give a flat curve."""

    class ByToken(SuccessorModel):
        def __call__(self, tokens_BT: torch.Tensor, context: Any, *, state: Any = None) -> Any:
            self.of_position = lambda _: (1 + tokens_BT.double()) / (2 + V)
            return super().__call__(tokens_BT, context, state=state)

    corpus = ArrayCorpus([np.random.default_rng(5).integers(0, V, 700).tolist()], V)
    gain = context_gain(ByToken(V, of_position), corpus, 512, 4, 0, alone())
    assert gain is not None
    losses = [point["loss"] for point in gain["curve"]]
    assert max(losses) - min(losses) < 1e-12
    assert len(losses) == 6


def test_gain_shards_add_up_and_short_documents_are_handled() -> None:
    corpus = ArrayCorpus([successors(1, 90)] * 3, V)
    model = SuccessorModel(V, of_position)
    whole = context_gain(model, corpus, 1024, 2, 3, alone())
    assert whole is not None
    # 1024 is halved until documents of 90 tokens are long enough: 64 inputs, the last 16 of them targets.
    assert (whole["targets"], [point["context"] for point in whole["curve"]]) == (32, [16, 32, 49])
    parts = [context_gain(model, corpus, 1024, 2, 3, shard_mesh(rank, 3)) for rank in range(3)]
    for index, point in enumerate(whole["curve"]):
        shared = sum(part["curve"][index]["loss"] for part in parts if part is not None)
        assert shared == pytest.approx(point["loss"], abs=1e-12)
    assert context_gain(model, ArrayCorpus([successors(0, 20)], V), 1024, 2, 3, alone()) is None
