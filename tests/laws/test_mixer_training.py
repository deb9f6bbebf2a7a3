"""Law 1 for every registered mixer and every recurrence, through the trainer and through DeepSpeed ZeRO-3."""

from dataclasses import replace
from typing import Any

import pytest
from pool import Pool
from test_invisible_sharding_deepspeed import deepspeed
from training import Case, assert_same_training, relative, train

from longctx.mixers import MIXERS

OPTIONS = {name: {"chunk": 4} for name, mixer in MIXERS.items() if "chunk" in mixer.Options.model_fields}
MODELS: dict[str, dict[str, Any]] = {
    "all mixers": {"layers": list(MIXERS), "mixer_options": OPTIONS, "init_std": 0.05},
    "rmt": {"recurrence": {"kind": "rmt", "segment": 11, "memory": 3, "curriculum": ((0, 1), (1, 2), (3, 4))}},
    "armt": {"recurrence": {"kind": "armt", "segment": 11, "memory": 3, "keys": 4, "bptt": 2}},
}


@pytest.mark.parametrize("name", MODELS)
def test_training_agrees_for_any_degree(name: str, pool: Pool, seed: int) -> None:
    case = Case(length=37, batch=2, steps=6, seed=seed, model=MODELS[name], lr=1e-3)
    wanted = pool.run(train, 1, case, limit_s=120)[0]
    for degree in (2, 3):
        found = pool.run(train, degree, replace(case, degree=degree, recompute=degree == 3), limit_s=120)[0]
        assert_same_training(found, wanted, 1e-8)


@pytest.mark.tier2
@pytest.mark.parametrize("name", MODELS)
def test_zero_3_agrees(name: str, pool: Pool) -> None:
    """Parameters stay partitioned, so that a rank that enters modules in another order than the rest hangs.

    A deep stack of gates has gradients that fp32 itself gives to 1e-5 only: the error against fp64 is to be no larger
    than three times that of one rank. Gradients are compared before the first update: where one is 0 but for rounding,
    Adam's update is of full size in a random direction.
    """
    case = Case(length=37, batch=4, steps=3, seed=5, model=MODELS[name], lr=1e-4, fp64=False)
    recompute = "recurrence" not in MODELS[name]  # DeepSpeed cannot, and longctx check says so
    sharded = replace(case, degree=2, recompute=recompute, engine=deepspeed(3))
    one, exact = (pool.run(train, 1, replace(case, fp64=fp64), limit_s=120)[0] for fp64 in (False, True))
    found = pool.run(train, 4, sharded, limit_s=240)[0]
    assert found.hashes == one.hashes
    assert relative(found.grad_norms[0], exact.grad_norms[0]) < 1e-5
    for kind in ("losses", "gradients"):
        allowed = max(1e-5, 3 * largest_error(getattr(one, kind), getattr(exact, kind)))
        assert largest_error(getattr(found, kind), getattr(exact, kind)) <= allowed, kind


def largest_error(found: Any, exact: Any) -> float:
    """Relative to each number, or to the largest of a tensor."""
    if isinstance(exact, list):
        return max(relative(a, b) for a, b in zip(found, exact, strict=True))
    floor = 1e-4 * max(float(t.abs().max()) for t in exact.values())
    errors = ((found[n].double() - t).abs().max() / max(float(t.abs().max()), floor) for n, t in exact.items())
    return max(map(float, errors))
