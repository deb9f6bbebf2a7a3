"""Needle retrieval: prompts that fit exactly, and models whose accuracy is known."""

import math
import random

import pytest
import torch.distributed as dist
from eval_fakes import ArrayCorpus, ByteTokenizer, ReaderModel, answer_from_needle

from longctx.errors import DataError, LongctxError
from longctx.eval.needle import NeedleTask, choice_score, needle_retrieval
from longctx.runtime.mesh import Group, Mesh, alone

TOKENIZER = ByteTokenizer()
TEXT = "The grass is green. The sky is blue.\nThe sun is yellow! Here we go? There and back again\n"
HAYSTACK = ArrayCorpus([[*TEXT.encode(), 256]] * 4)
LENGTHS = (450, 611)
DEPTHS = (0.0, 0.3, 1.0)


def task(seed: int = 0, distractors: int = 9) -> NeedleTask:
    return NeedleTask(TOKENIZER, HAYSTACK, seed, distractors)


@pytest.mark.parametrize("length", [450, 611, 1024])
@pytest.mark.parametrize("depth", DEPTHS)
def test_prompt_and_answer_fill_the_length_exactly(length: int, depth: float) -> None:
    sample = task().sample(length, depth, 1)
    assert len(sample.prompt) + sample.new_tokens == length
    text = TOKENIZER.decode(list(sample.prompt))
    assert text.count(f"is: {sample.value}.\n") == 1
    assert text.endswith("mentioned in the provided text is")
    assert 256 not in sample.prompt
    assert all(len(candidate) <= sample.new_tokens for candidate in sample.candidates)


def test_candidates_are_distinct_numbers_of_one_length_and_only_the_first_is_in_the_prompt() -> None:
    sample = task().sample(700, 0.5, 0)
    values = [TOKENIZER.decode(list(candidate)) for candidate in sample.candidates]
    assert len(set(values)) == 10
    assert values[0] == f" {sample.value}."
    assert {len(value) for value in values} == {9}
    text = TOKENIZER.decode(list(sample.prompt))
    assert [value.strip(" .") in text for value in values] == [True] + [False] * 9


def test_depth_orders_the_needle_and_sentences_stay_whole() -> None:
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = TOKENIZER.decode(list(task().sample(2000, depth, 0).prompt))
        place = text.index("\nOne of the special magic numbers")
        assert text[place - 1] in "\n.!?"
        places.append(place)
    assert places == sorted(places)
    assert places[0] == text.index("afterwards.\n") + len("afterwards.\n")
    assert places[-1] > 1600


def test_samples_are_a_function_of_seed_cell_and_number() -> None:
    assert task().sample(600, 0.5, 3) == task().sample(600, 0.5, 3)
    others = [task(1).sample(600, 0.5, 3), task().sample(600, 0.5, 4), task().sample(600, 0.6, 3)]
    assert len({sample.value for sample in [task().sample(600, 0.5, 3), *others]}) == 4


def test_copying_model_scores_one() -> None:
    result = needle_retrieval(ReaderModel(answer_from_needle), task(), TOKENIZER, LENGTHS, DEPTHS, 2, alone())
    assert result["choice_accuracy"] == 1.0
    assert result["greedy_accuracy"] == 1.0
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [(n, d) for n in LENGTHS for d in DEPTHS]
    assert result["samples"] == 12


def test_copying_model_scores_one_when_states_cannot_be_continued() -> None:
    model = ReaderModel(answer_from_needle, survives=False)
    result = needle_retrieval(model, task(), TOKENIZER, (450,), (0.5,), 1, alone())
    assert (result["choice_accuracy"], result["greedy_accuracy"]) == (1.0, 1.0)


def test_constant_model_scores_chance_exactly() -> None:
    result = needle_retrieval(ReaderModel(lambda text: None), task(), TOKENIZER, LENGTHS, DEPTHS, 2, alone())
    assert result["chance"] == 0.1
    assert [cell["choice_accuracy"] for cell in result["cells"]] == [pytest.approx(0.1, abs=1e-15)] * 6
    assert result["greedy_accuracy"] == 0.0


def test_model_that_ignores_the_text_scores_near_chance() -> None:
    """A model with an opinion on every number but none on the text: right about one time in four."""

    def opinion(text: str) -> str:
        return random.Random(text[-3:]).choice("0123456789")

    result = needle_retrieval(ReaderModel(opinion), task(distractors=3), TOKENIZER, (450,), (0.5,), 300, alone())
    # 300 draws at chance 0.25: a standard deviation is 0.025.
    assert abs(result["choice_accuracy"] - 0.25) < 0.1
    assert result["chance"] == 0.25


def test_blind_spot_shows_in_its_cell_only() -> None:
    """A model that sees the last 400 bytes finds the needle at the end and not at the start."""
    model = ReaderModel(lambda text: answer_from_needle(text[-400:]))
    result = needle_retrieval(model, task(), TOKENIZER, (1200,), (0.0, 1.0), 2, alone())
    assert [cell["greedy_accuracy"] for cell in result["cells"]] == [0.0, 1.0]
    assert [cell["choice_accuracy"] for cell in result["cells"]] == [pytest.approx(0.1, abs=1e-15), 1.0]


def test_ranks_share_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    # No process group here: what a rank holds before the reduction is its own share.
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **options: None)
    whole = needle_retrieval(ReaderModel(answer_from_needle), task(), TOKENIZER, (450,), DEPTHS, 3, alone())
    parts = []
    for rank in range(2):
        mesh = Mesh(Group(rank, (0, 1)), Group(0, (0,)), Group(0, (0,)), alone().device)
        counted: list[None] = []
        part = needle_retrieval(
            ReaderModel(answer_from_needle), task(), TOKENIZER, (450,), DEPTHS, 3, mesh,
            advance=lambda counted=counted: counted.append(None),  # type: ignore[misc]
        )  # fmt: skip
        parts.append(part)
        assert len(counted) == [5, 4][rank]
    assert sum(part["choice_accuracy"] for part in parts) == pytest.approx(whole["choice_accuracy"], abs=1e-15)


@pytest.mark.parametrize(
    "log_probs, expected",
    [
        ([-1.0, -2.0], 1.0), ([-2.0, -1.0], 0.0), ([-1.0, -1.0], 0.5), ([-2.0, -1.0, -1.0], 0.0),
        ([-1.0, -3.0, -1.0, -1.0], 1 / 3), ([-math.inf, -math.inf], 0.5),
    ],
)  # fmt: skip
def test_choice_score(log_probs: list[float], expected: float) -> None:
    assert choice_score(log_probs) == expected


def test_nan_is_an_error_not_a_wrong_answer() -> None:
    with pytest.raises(LongctxError, match="are nan"):
        choice_score([-1.0, math.nan])


def test_too_short_a_length_is_refused_with_the_least_possible_one() -> None:
    with pytest.raises(DataError, match=r"needs at least \d+ tokens of context, not 100") as caught:
        task().sample(100, 0.5, 0)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    # Every length draws its own key, and keys differ by a few bytes (they occur three times).
    task().sample(least + 40, 0.5, 0)
    with pytest.raises(DataError):
        task().sample(least - 40, 0.5, 0)
    with pytest.raises(DataError):
        needle_retrieval(ReaderModel(answer_from_needle), task(), TOKENIZER, (450, 100), DEPTHS, 1, alone())


def test_text_without_words_is_refused() -> None:
    with pytest.raises(DataError, match="no held-out text"):
        NeedleTask(TOKENIZER, ArrayCorpus([]), 0)
    with pytest.raises(DataError, match="apart from end-of-document"):
        NeedleTask(TOKENIZER, ArrayCorpus([[256]] * 3), 0).sample(500, 0.5, 0)
