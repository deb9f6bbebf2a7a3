"""Law 1: loss, gradients, tokens seen and token ids do not depend on how a sequence is cut over ranks."""

import random
from dataclasses import replace

import pytest
from pool import Pool
from training import Case, assert_same_training, train

from longctx.attention.schemes import SCHEMES
from longctx.sequence.layout import LAYOUTS

TIED = {"tie_embeddings": True, "qk_norm": True, "qkv_bias": True}


def test_twenty_steps_agree_for_every_degree(pool: Pool, seed: int) -> None:
    case = Case(length=53, steps=20, batch=3, seed=seed % 1000)
    (wanted,) = pool.run(train, 1, case)
    assert len(wanted.losses) == 20
    assert wanted.losses[-1] != wanted.losses[0]
    for degree in (2, 3, 4):
        found = pool.run(train, degree, replace(case, degree=degree))[0]
        assert_same_training(found, wanted, 1e-10)


@pytest.mark.parametrize("round_", range(4))
def test_random_shapes_agree(pool: Pool, seed: int, round_: int) -> None:
    rng = random.Random(seed + round_)
    kv_heads = rng.choice([1, 2, 3])
    case = Case(
        length=rng.choice([1, 2, 3, 5, 17, 31, 64, 97]),
        layout=rng.choice(sorted(LAYOUTS)),
        batch=6,
        micro_batch=rng.choice([1, 3]),
        seed=rng.randrange(1000),
        recompute=rng.random() < 0.5,
        model={
            "num_kv_heads": kv_heads, "num_heads": kv_heads * rng.choice([1, 2]), "head_dim": rng.choice([4, 6, 8]),
            "sliding_window": rng.choice([None, 1, 5, 16]), **rng.choice([{}, TIED]),
        },
    )  # fmt: skip
    print(case)
    (wanted,) = pool.run(train, 1, case)
    for world, degree in ((2, 2), (3, 3), (4, 2)):
        # A data rank must get whole micro-batches: 6 rows over 2 data ranks of 3 or 1.
        found = pool.run(train, world, replace(case, degree=degree))[0]
        assert_same_training(found, wanted, 1e-10)


@pytest.mark.parametrize("layout", ["striped", "balanced"])
def test_layouts_of_many_pieces_agree(pool: Pool, seed: int, layout: str) -> None:
    """Micro-batches of two rows, whose documents decide together how balanced cuts them, and differently each time."""
    case = Case(length=97, layout=layout, batch=4, micro_batch=2, seed=seed % 1000)
    (wanted,) = pool.run(train, 1, case)
    for degree in (2, 3):
        found = pool.run(train, degree, replace(case, degree=degree))[0]
        assert_same_training(found, wanted, 1e-10)


@pytest.mark.parametrize("scheme", [*SCHEMES, "auto"])
def test_every_scheme_agrees(pool: Pool, seed: int, scheme: str) -> None:
    """Head counts that do not divide the ranks; on four ranks some have no head at all."""
    model = {"num_heads": 3, "num_kv_heads": 3, "head_dim": 6, "sliding_window": 19, "window_layers": [True, False]}
    case = Case(length=53, steps=20, batch=2, seed=seed % 1000, scheme=scheme, model=model, recompute=True)
    (wanted,) = pool.run(train, 1, replace(case, recompute=False))
    for degree, inner in ((2, 2), (4, 2)):
        found = pool.run(train, degree, replace(case, degree=degree, inner=inner))[0]
        assert_same_training(found, wanted, 1e-10)


def test_a_single_wrong_label_is_noticed(pool: Pool) -> None:
    case = Case(steps=1, batch=2)
    (wanted,) = pool.run(train, 1, case)
    found = pool.run(train, 2, replace(case, degree=2, fault=True))[0]
    with pytest.raises(AssertionError):
        assert_same_training(found, wanted, 1e-10)


def test_recomputation_changes_no_bit(pool: Pool) -> None:
    plain, again = (pool.run(train, 2, Case(degree=2, recompute=r))[0] for r in (False, True))
    assert plain.losses == again.losses
    assert all((plain.weights[name] == again.weights[name]).all() for name in plain.weights)
