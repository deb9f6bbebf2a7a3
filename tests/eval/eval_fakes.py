"""Models, tokenizers and texts whose scores are known exactly.

Shapes: B batch, T local tokens, V vocabulary. The fakes' hidden states are their logits (D = V).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from longctx.config.schema import Model
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Run

Int64Array = npt.NDArray[np.int64]


class FakeOutput(NamedTuple):
    hidden_BTD: torch.Tensor
    state: Any


class SuccessorModel:
    """Gives the token ``(t + 1) % V`` after token t the probability ``of_position(p)``, the rest share what is left."""

    config = Model()

    def __init__(self, vocab_size: int, of_position: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.vocab_size = vocab_size
        self.of_position = of_position
        self.widest_logits = 0

    def __call__(
        self, tokens_BT: torch.Tensor, context: SequenceContext, *, state: Any = None, last_only: bool = False
    ) -> FakeOutput:
        positions_BT = context.positions()
        assert positions_BT.shape == tokens_BT.shape
        likely_BT = self.of_position(positions_BT).double()
        rest_BT = ((1 - likely_BT) / (self.vocab_size - 1)).log()
        logits_BTV = rest_BT[..., None].repeat(1, 1, self.vocab_size)
        # An offset that differs per token: log-probabilities, not logits, must be used.
        logits_BTV.scatter_(2, ((tokens_BT + 1) % self.vocab_size)[..., None], likely_BT.log()[..., None])
        hidden_BTD = logits_BTV + tokens_BT[..., None]
        return FakeOutput(hidden_BTD[:, -1:] if last_only else hidden_BTD, None)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        self.widest_logits = max(self.widest_logits, hidden_BTD.shape[:-1].numel())
        return hidden_BTD

    def empty_state(self, batch: int, cache: Any = None) -> Any:
        return ()

    def state_survives(self, past: int, length: int) -> bool:
        return True


class ReaderModel:
    """Reads bytes as text and predicts the next byte by ``predict(text so far)``; None means it does not know."""

    config = Model()

    def __init__(self, predict: Callable[[str], str | None], vocab_size: int = 257, survives: bool = True) -> None:
        self.predict = predict
        self.vocab_size = vocab_size
        self.survives = survives

    def __call__(
        self, tokens_BT: torch.Tensor, context: SequenceContext, *, state: Any = None, last_only: bool = False
    ) -> FakeOutput:
        seen = list(state or ())
        assert len(seen) == context.past
        logits_TV = torch.zeros(tokens_BT.shape[1], self.vocab_size, dtype=torch.float64)
        text = "".join(map(chr, seen))
        for index, token in enumerate(tokens_BT[0].tolist()):
            text += chr(token)
            if (guess := self.predict(text)) is not None:
                logits_TV[index, ord(guess)] = 20.0
        logits_TV = logits_TV[-1:] if last_only else logits_TV
        return FakeOutput(logits_TV[None], tuple(seen + tokens_BT[0].tolist()))

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD

    def empty_state(self, batch: int, cache: Any = None) -> Any:
        return ()

    def state_survives(self, past: int, length: int) -> bool:
        return self.survives


def answer_from_needle(text: str) -> str | None:
    """The next character of the needle's number, once the question has been asked."""
    question = re.search(r"The special magic number for (\w+ \w+) mentioned in the provided text is(.*)$", text, re.S)
    if question is None:
        return None
    hidden = re.search(rf"One of the special magic numbers for {question[1]} is: (\d+)\.", text)
    return next_character(f" {hidden[1]}." if hidden else "", question[2])


def next_character(answer: str, written: str) -> str | None:
    """What follows ``written`` in ``answer``, if anything does."""
    return answer[len(written)] if answer.startswith(written) and len(written) < len(answer) else None


class ByteTokenizer:
    """One token per byte; 256 ends a document."""

    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


@dataclass
class ArrayCorpus:
    """Documents laid end to end, in memory."""

    documents: Sequence[Sequence[int]]
    vocab_size: int = 257

    @property
    def offsets(self) -> Int64Array:
        return np.cumsum([0, *map(len, self.documents)])

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.documents))

    def tokens(self, start: int, stop: int) -> Int64Array:
        assert 0 <= start <= stop <= self.num_tokens
        flat = [token for document in self.documents for token in document]
        return np.array(flat[start:stop], dtype=np.int64)


class SuccessorRows:
    """Rows in which every token is followed by its successor; ``starts[row]`` are the documents of a row."""

    def __init__(self, length: int, starts: Sequence[tuple[int, ...]], vocab_size: int) -> None:
        self.length = length
        self.starts = starts
        self.vocab_size = vocab_size

    def documents(self, row: int) -> tuple[int, ...]:
        return self.starts[row]

    def read(self, row: int, runs: Sequence[Run]) -> tuple[Int64Array, Int64Array]:
        tokens_S = (np.arange(self.length, dtype=np.int64) + 7 * row) % self.vocab_size
        labels_S = (tokens_S + 1) % self.vocab_size
        for start in self.starts[row][1:]:
            labels_S[start - 1] = -100
        index = np.concatenate([np.empty(0, np.int64), *(np.arange(*run, dtype=np.int64) for run in runs)])
        return tokens_S[index], labels_S[index]
