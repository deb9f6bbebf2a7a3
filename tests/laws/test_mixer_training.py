"""Law 1 for every registered mixer, recurrence and layers over blocks, by the trainer and by DeepSpeed ZeRO-3."""

from dataclasses import replace

import pytest
from mixer_models import MODELS, SMALL
from pool import Pool
from test_invisible_sharding_deepspeed import deepspeed
from training import Case, assert_same_training, train

EVERY = [pytest.param(name, marks=() if name in SMALL else pytest.mark.tier2) for name in MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_twenty_steps_agree(name: str, pool: Pool, seed: int) -> None:
    case = Case(length=37, batch=2, steps=20, seed=seed, model=MODELS[name], lr=1e-3)
    wanted = pool.run(train, 1, case, limit_s=120)[0]
    found = pool.run(train, 3, replace(case, degree=3, recompute=True), limit_s=120)[0]
    assert_same_training(found, wanted, 1e-10)


@pytest.mark.tier2
@pytest.mark.parametrize("name", MODELS)
def test_zero_3_agrees(name: str, pool: Pool) -> None:
    """Parameters stay partitioned, so that a rank that enters modules in another order than the rest hangs.

    A wavefront does, and gets no more than ZeRO-2.
    """
    stage = 2 if name == "wavefront" else 3
    case = Case(length=37, batch=4, steps=20, seed=5, model=MODELS[name], lr=1e-4, fp64=False)
    wanted = pool.run(train, 1, case, limit_s=120)[0]
    recompute = "recurrence" not in MODELS[name]  # DeepSpeed cannot, and longctx check says so
    found = pool.run(train, 2, replace(case, degree=2, recompute=recompute, engine=deepspeed(stage)), limit_s=240)[0]
    assert_same_training(found, wanted, 1e-5)
