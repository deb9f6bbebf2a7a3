"""Law 1 through DeepSpeed: every ZeRO stage, sequence degree, data degree, with uneven labels and accumulation."""

from dataclasses import replace

import pytest
from pool import Pool
from training import Case, assert_same_training, train

# Large enough that ZeRO-3 keeps parameters partitioned and cannot hide an order fault by gathering all at once.
PARTITIONED = {
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 2000,
}  # fmt: skip
SCHEMES = ("ulysses", "hybrid", "double_ring", "allgather")
CASE = Case(length=45, steps=20, batch=6, micro_batch=1, fp64=False, seed=5, lr=1e-3)


def deepspeed(stage: int) -> dict[str, object]:
    options = {"zero_optimization": PARTITIONED} if stage == 3 else {}
    return {"kind": "deepspeed", "zero": stage, "options": options}


@pytest.fixture(scope="module")
def wanted(pool: Pool):  # type: ignore[no-untyped-def]
    """The reference: one process, no DeepSpeed, fp32."""
    return pool.run(train, 1, CASE)[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world, degree", [(2, 2), (2, 1), (3, 3), (4, 2)])
def test_twenty_steps_agree(pool: Pool, wanted, stage: int, world: int, degree: int) -> None:  # type: ignore[no-untyped-def]
    case = replace(CASE, degree=degree, engine=deepspeed(stage), recompute=stage == 3)
    found = pool.run(train, world, case, limit_s=120)[0]
    assert_same_training(found, wanted, 1e-5)


@pytest.mark.tier2
@pytest.mark.parametrize("scheme, stage", list(zip(SCHEMES * 2, (3, 3, 3, 3, 0, 1, 2, 1), strict=True)))
def test_twenty_steps_of_every_scheme_agree(pool: Pool, wanted, scheme: str, stage: int) -> None:  # type: ignore[no-untyped-def]
    case = replace(CASE, degree=4, inner=2, scheme=scheme, engine=deepspeed(stage), recompute=stage == 3)
    found = pool.run(train, 4, case, limit_s=120)[0]
    assert_same_training(found, wanted, 1e-5)
