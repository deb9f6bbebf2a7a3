"""Every scheme x layout x documents x mask x heads x length, on 1 to 8 ranks, against the dense fp64 oracle.

Every single-axis variation of a base case, and every pair of values of any two axes, in output, log-sum-exp and all
gradients to 1e-10.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch
from attention_cases import Answer, Problem, oracle, random_documents, solve, worst
from pool import Pool

from longctx.attention.schemes import SCHEMES
from longctx.sequence.layout import LAYOUTS

Case = tuple[Any, ...]
AXES: Mapping[str, Sequence[Any]] = {
    "scheme": tuple(SCHEMES),
    "layout": tuple(LAYOUTS),
    "documents": ("one", "none", "packed", "tiny", "empty rank"),
    "mask": ("causal", "bidirectional", "window", "bidirectional window", "sink"),
    "heads": ((6, 2), (4, 4), (8, 1), (7, 7), (9, 3), (2, 1)),
    "length": ("even", "prime", "short"),
}
NAMES = tuple(AXES)


def single_axis() -> Iterator[Case]:
    """The base case and all that differ from it in one axis."""
    base = tuple(values[0] for values in AXES.values())
    yield base
    for place, values in enumerate(AXES.values()):
        yield from ((*base[:place], value, *base[place + 1 :]) for value in values[1:])


def pairwise(rng: random.Random) -> list[Case]:
    """Cases in which any two values of any two axes meet, few by greedy choice among random candidates."""
    missing = {
        ((i, a), (j, b)) for i, j in combinations(range(len(NAMES)), 2)
        for a, b in product(AXES[NAMES[i]], AXES[NAMES[j]])
    }  # fmt: skip
    cases = []
    while missing:
        first, second = min(missing, key=repr)
        candidates = []
        for _ in range(30):
            case = [rng.choice(values) for values in AXES.values()]
            case[first[0]], case[second[0]] = first[1], second[1]
            candidates.append(tuple(case))
        best = max(candidates, key=lambda case: len(missing & covered(case)))
        missing -= covered(best)
        cases.append(best)
    return cases


def covered(case: Case) -> set[Any]:
    return {((i, case[i]), (j, case[j])) for i, j in combinations(range(len(case)), 2)}


def problem_of(case: Case, world: int, rng: random.Random) -> Problem:
    """The case as a problem on ``world`` ranks."""
    scheme, layout, documents, mask, (heads, kv_heads), kind = case
    length = {"even": 8 * world, "prime": rng.choice([37, 41, 53]), "short": max(1, world - 1)}[kind]
    rows = rng.choice([1, 2])
    starts = {
        "one": ((0,),) * rows,
        "none": ((0,),) * rows,
        "packed": random_documents(rng, rows, length),
        "tiny": (tuple(range(length)),) * rows,
        "empty rank": ((0, length // 2) if length > 1 else (0,),) * rows,
    }[documents]
    return Problem(
        length, starts, heads, kv_heads, rng.choice([4, 8, 5]), layout,
        causal=not mask.startswith("bidirectional"), window=rng.choice([2, 5, 11]) if "window" in mask else None,
        sink=mask == "sink" or rng.random() < 0.2, scheme=scheme, inner=rng.choice([1, 2, 3, 4]),
        empty_rank=documents == "empty rank", seed=rng.randrange(2**31), bias=rng.random() < 0.3,
    )  # fmt: skip


def cases(rng: random.Random) -> list[Case]:
    return list(dict.fromkeys([*single_axis(), *pairwise(rng)]))


def assert_all_exact(pool: Pool, world: int, rng: random.Random) -> None:
    problems = [problem_of(case, world, rng) for case in cases(rng)]
    for problem, found in zip(problems, solve(pool, world, problems, limit_s=240), strict=True):
        errors = worst(found, oracle(problem))
        assert max(errors.values()) < 1e-10, (world, problem, errors)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_pair_of_choices_is_exact(pool: Pool, seed: int, world: int) -> None:
    assert_all_exact(pool, world, random.Random(seed))


@pytest.mark.tier2
def test_every_pair_of_choices_is_exact_on_eight_ranks(pool: Pool, seed: int) -> None:
    assert_all_exact(pool, 8, random.Random(seed))


def test_the_matrix_covers_every_pair(seed: int) -> None:
    drawn = cases(random.Random(seed))
    for i, j in combinations(range(len(NAMES)), 2):
        assert {(case[i], case[j]) for case in drawn} == set(product(AXES[NAMES[i]], AXES[NAMES[j]]))
    assert len(drawn) < math.prod(len(values) for values in AXES.values()) / 20


def test_an_error_in_one_number_is_noticed(pool: Pool, seed: int) -> None:
    problem = problem_of(next(single_axis()), 2, random.Random(seed))
    (found,) = solve(pool, 2, [problem])
    for name, tensor in found.tensors().items():
        spoiled = {
            **found.tensors(),
            name: tensor + 1e-8 * tensor.abs().max() * torch.nn.functional.one_hot(torch.tensor(0), tensor.shape[-1]),
        }
        assert max(worst(Answer(**spoiled), oracle(problem)).values()) > 1e-10, name
