"""Needle retrieval: a sentence with a random number is hidden in held-out text and asked for at the end.

Question and needle are worded as in RULER's ``niah_single`` (Hsieh et al. 2024), but the haystack is the caller's own
text, so scores are not RULER scores. Two measures per sample:

- multiple choice: is the true number the most probable of ``1 + distractors`` random numbers of equal length? All are
  drawn alike, so a model that ignores its context scores ``1 / (1 + distractors)``. A tie counts as its share.
- greedy: is the true number a substring of the greedily decoded answer? Chance is about 10^-7.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from longctx.errors import DataError, LongctxError
from longctx.eval.scoring import Prompt
from longctx.generate.decode import LanguageModel
from longctx.runtime.agreement import agree
from longctx.runtime.mesh import Mesh

Int64Array = npt.NDArray[np.int64]
_DIGITS = 7
_SLACK = 4
"""Tokens the greedy answer may be longer than the longest candidate."""
_SENTENCE_ENDS = ("\n", ".", "!", "?")
_BACK_UP = 256
"""Tokens the needle moves towards the start, at most, to stand at the end of a line or sentence."""
_ADJECTIVES = (
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen", "lively", "mellow",
    "nimble", "odd", "proud", "quiet", "rapid", "silver", "tidy", "urban", "vivid", "wild", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jacket", "kettle",
    "ladder", "meadow", "needle", "orchard", "pencil", "quarry", "river", "saddle", "temple", "umbrella", "valley",
    "window", "yacht",
)  # fmt: skip
_HEAD = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)


class TextTokenizer(Protocol):
    """The part of :class:`longctx.data.tokenizer.Tokenizer` that is used."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Haystack(Protocol):
    """The part of :class:`longctx.data.corpus.Corpus` that is used."""

    @property
    def num_tokens(self) -> int: ...

    def tokens(self, start: int, stop: int) -> Int64Array: ...


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer.

    ``candidates[0]`` is the true number's tokens, the others are distractors; ``len(prompt) + new_tokens`` is exactly
    the context length asked for.
    """

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    value: str
    new_tokens: int


@dataclass(frozen=True)
class _Frame:
    """A sample without its haystack, which has ``room`` tokens and is drawn with ``generator``."""

    head: list[int]
    needle: list[int]
    question: list[int]
    candidates: tuple[tuple[int, ...], ...]
    value: str
    new_tokens: int
    room: int
    generator: np.random.Generator


class NeedleTask:
    """Builds samples, each a pure function of (seed, length, depth, number).

    Args:
        distractors: wrong numbers per multiple-choice question.
    """

    def __init__(self, tokenizer: TextTokenizer, haystack: Haystack, seed: int, distractors: int = 9) -> None:
        if haystack.num_tokens == 0:
            raise DataError("the corpus has no held-out text to hide needles in; build it with a held-out split")
        self._tokenizer = tokenizer
        self._haystack = haystack
        self._seed = seed
        self.distractors = distractors
        self._ends: dict[int, bool] = {}

    @property
    def chance(self) -> float:
        """Multiple-choice accuracy of a model that ignores its context."""
        return 1 / (1 + self.distractors)

    def sample(self, length: int, depth: float, number: int) -> Sample:
        """The ``number``-th sample of a cell; ``depth`` 0 puts the needle first, 1 last in the text.

        Raises:
            DataError: see :meth:`check`.
        """
        frame = self._frame(length, depth, number)
        text = self._text(frame.room, frame.generator)
        place = self._place(text, round(depth * frame.room))
        prompt = (*frame.head, *text[:place], *frame.needle, *text[place:], *frame.question)
        return Sample(prompt, frame.candidates, frame.value, frame.new_tokens)

    def check(self, length: int, depth: float, number: int) -> None:
        """Make sure that a sample can be built, without reading its text.

        Raises:
            DataError: ``length`` is too short for needle, question and answer alone.
        """
        self._frame(length, depth, number)

    def fits(self, length: int, depths: Sequence[float], samples: int) -> bool:
        """Whether every sample of a length can be built."""
        try:
            for depth in depths:
                for number in range(samples):
                    self.check(length, depth, number)
        except DataError:
            return False
        return True

    def _frame(self, length: int, depth: float, number: int) -> "_Frame":
        generator = np.random.default_rng([self._seed, length, round(1e6 * depth), number])
        key = f"{generator.choice(_ADJECTIVES)} {generator.choice(_NOUNS)}"
        values = _distinct_values(generator, 1 + self.distractors)
        asked = (
            f"\nWhat is the special magic number for {key} mentioned in the provided text?"
            f" The special magic number for {key} mentioned in the provided text is"
        )
        question, candidates = self._question(asked, values)
        head = self._tokenizer.encode(_HEAD)
        needle = self._tokenizer.encode(f"\nOne of the special magic numbers for {key} is: {values[0]}.\n")
        new_tokens = max(map(len, candidates)) + _SLACK
        room = length - new_tokens - len(head) - len(needle) - len(question)
        if room < 0:
            raise DataError(f"needle retrieval needs at least {length - room} tokens of context, not {length}")
        return _Frame(head, needle, question, tuple(map(tuple, candidates)), values[0], new_tokens, room, generator)

    def _question(self, question: str, values: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Question and candidate answers cut where their tokens part, so that every answer continues the prompt as
        the tokenizer itself would write it."""
        whole = [self._tokenizer.encode(f"{question} {value}.") for value in values]
        shared = _common_prefix([self._tokenizer.encode(question), *whole])
        return whole[0][:shared], [ids[shared:] for ids in whole]

    def _text(self, size: int, generator: np.random.Generator) -> list[int]:
        """``size`` tokens of held-out text from a random place on, round the end, without end-of-document tokens."""
        text: list[int] = []
        at, total = int(generator.integers(self._haystack.num_tokens)), self._haystack.num_tokens
        empty = 0
        while len(text) < size:
            piece = self._haystack.tokens(at, min(at + size - len(text), total))
            kept = piece[piece != self._tokenizer.eos_id].tolist()
            text += kept
            at = (at + len(piece)) % total
            empty = 0 if kept else empty + len(piece)
            if empty >= total:
                raise DataError("the corpus's held-out text is empty apart from end-of-document tokens")
        return text

    def _place(self, text: Sequence[int], place: int) -> int:
        for cut in range(place, max(0, place - _BACK_UP), -1):
            if self._ends_sentence(text[cut - 1]):
                return cut
        return place

    def _ends_sentence(self, token: int) -> bool:
        if token not in self._ends:
            self._ends[token] = self._tokenizer.decode([token]).endswith(_SENTENCE_ENDS)
        return self._ends[token]


def needle_retrieval(
    model: LanguageModel,
    task: NeedleTask,
    tokenizer: TextTokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    mesh: Mesh,
    *,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Accuracy over lengths x depths with ``samples`` samples per cell; each rank does its share of the samples.

    Every sample runs whole on one rank, whatever the world's size.
    """
    cells = [(length, depth) for length in lengths for depth in depths]
    scores_C2 = torch.zeros(len(cells), 2, dtype=torch.float64)

    def score_share() -> None:
        # Refuse a length that is too short before any sample is scored.
        for (length, depth), number in product(cells, range(samples)):
            task.check(length, depth, number)
        for cell, number in _share(len(cells), samples, mesh):
            sample = task.sample(*cells[cell], number)
            prompt = Prompt(model, sample.prompt, mesh.device)
            scores_C2[cell, 0] += choice_score([prompt.log_prob(candidate) for candidate in sample.candidates])
            answer = tokenizer.decode(prompt.greedy(sample.new_tokens, tokenizer.eos_id))
            scores_C2[cell, 1] += sample.value in answer
            advance()

    agree(mesh, score_share)
    means = (mesh.all_reduce(scores_C2.to(mesh.device)) / samples).tolist()
    return {
        "chance": task.chance,
        "distractors": task.distractors,
        "samples": len(cells) * samples,
        "samples_per_cell": samples,
        "choice_accuracy": sum(choice for choice, _ in means) / len(cells),
        "greedy_accuracy": sum(greedy for _, greedy in means) / len(cells),
        "cells": [
            {"length": length, "depth": depth, "choice_accuracy": choice, "greedy_accuracy": greedy}
            for (length, depth), (choice, greedy) in zip(cells, means, strict=True)
        ],
    }


def choice_score(log_probs: Sequence[float]) -> float:
    """1 if the first candidate is the most probable, 1/n if it shares that place with n - 1 others, else 0.

    Raises:
        LongctxError: a log-probability is nan.
    """
    if any(map(math.isnan, log_probs)):
        raise LongctxError(
            "the model's log-probabilities are nan: its weights hold nan or inf, or overflow in this dtype"
        )
    best = max(log_probs)
    return 1 / log_probs.count(best) if log_probs[0] == best else 0.0


def _share(cells: int, samples: int, mesh: Mesh) -> Iterator[tuple[int, int]]:
    work = [(cell, number) for cell in range(cells) for number in range(samples)]
    return iter(work[mesh.world.rank :: mesh.world.size])


def _distinct_values(generator: np.random.Generator, count: int) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < count:
        values[str(generator.integers(10 ** (_DIGITS - 1), 10**_DIGITS))] = None
    return list(values)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    for index, tokens in enumerate(zip(*sequences, strict=False)):
        if len(set(tokens)) > 1:
            return index
    return min(map(len, sequences))
