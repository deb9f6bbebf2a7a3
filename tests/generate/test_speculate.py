"""Speculation writes what greedy decoding writes, whatever is proposed, for every kind of state."""

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from test_generate_store import MODELS, SIZES, model_of
from torch import Tensor

from longctx.cache.options import CacheOptions
from longctx.config.schema import Model
from longctx.errors import ConfigError, DataError
from longctx.generate.decode import decode_ids
from longctx.generate.speculate import PromptLookup, speculate_ids
from longctx.model.block_transformer import build_native


class Oracle:
    """Proposes the right continuation, with a wrong token here and there."""

    def __init__(self, text: Sequence[int], seed: int, wrong: float) -> None:
        self.text, self.draw, self.wrong = text, random.Random(seed), wrong
        self.calls = 0

    def propose(self, ids: Sequence[int], hidden_D: Tensor) -> Sequence[int]:
        self.calls += 1
        assert hidden_D.shape == (24,)
        right = self.text[len(ids) : len(ids) + self.draw.randrange(0, 6)]
        return [(t + 1) % 61 if self.draw.random() < self.wrong else t for t in right]


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    return [row[0] for row in decode_ids(model, [prompt], new)]


@pytest.mark.parametrize("name", MODELS)
def test_any_proposals_give_greedy_text(name: str, seed: int) -> None:
    model, prompt = (
        model_of(name, seed),
        torch.randint(61, (13,), generator=torch.Generator().manual_seed(seed)).tolist(),
    )
    wanted = greedy(model, prompt, 30)
    for wrong in (0.0, 0.3, 1.0):
        oracle = Oracle(prompt + wanted, seed, wrong)
        runs = list(speculate_ids(model, prompt, 30, oracle, CacheOptions(block=4), chunk=5))
        assert [token for run in runs for token in run] == wanted
        assert (max(map(len, runs)) == 1) == (wrong == 1.0)


def test_a_rotation_that_changes_with_the_length(seed: int) -> None:
    """Bug: tokens of one pass were all rotated by the length at its end. Fix: a pass ends before that changes.

    Past the length that the table is for, every token changes it and runs alone; proposals before may run together.
    """
    rope = {"rope": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 30}
    model, prompt = build_native(Model.model_validate({**SIZES, **rope}), seed=seed).double(), list(range(3, 18))
    wanted = greedy(model, prompt, 40)
    for wrong in (0.0, 0.3):
        runs = list(speculate_ids(model, prompt, 40, Oracle(prompt + wanted, seed, wrong)))
        assert [token for run in runs for token in run] == wanted
        late = [len(run) for run, end in zip(runs, accumulate(map(len, runs)), strict=True) if len(prompt) + end > 31]
        assert len(runs) < 40 and set(late[1:]) == {1}


def test_lookup_proposes_what_followed_last_time() -> None:
    none = torch.empty(0)
    assert PromptLookup(3, 2).propose([1, 2, 3, 4, 5, 1, 2], none) == [3, 4, 5]
    assert PromptLookup(2, 2).propose([1, 2, 3, 9, 2, 4, 4, 1, 2], none) == [3, 9]
    assert PromptLookup(4, 3).propose([7, 2, 3, 9, 2], none) == [3, 9, 2]
    assert PromptLookup(4, 3).propose([1, 2, 3], none) == []
    assert PromptLookup(4, 3).propose([5], none) == []


def test_a_text_that_repeats_itself_needs_fewer_passes(seed: int) -> None:
    """A random model that writes 400 tokens of 61 says some again; how much varies with the seed."""
    model = model_of("softmax", seed)
    runs = list(speculate_ids(model, [3, 1, 4], 400, PromptLookup(8, 4)))
    assert [t for run in runs for t in run] == greedy(model, [3, 1, 4], 400)
    assert len(runs) < 400 and max(map(len, runs)) > 1


def test_wrong_use_is_refused(seed: int) -> None:
    with pytest.raises(DataError, match="the prompt is empty"):
        list(speculate_ids(model_of("softmax", seed), [], 3, PromptLookup()))
    with pytest.raises(ConfigError, match="both are 1 or more"):
        PromptLookup(0)
