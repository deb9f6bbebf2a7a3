"""Law 1 for every registered mixer, recurrence and layers over blocks, by the trainer and by DeepSpeed ZeRO-3."""

from dataclasses import replace
from typing import Any

import pytest
from pool import Pool
from small_mixers import small_options
from test_invisible_sharding_deepspeed import deepspeed
from training import Case, assert_same_training, train

from longctx.mixers import MIXERS


def two_layers(name: str) -> dict[str, Any]:
    """A decoder of one mixer, in a small size where it has one, and with the start of a default config.

    From ten times larger weights AGaLiTe's and TTT's gradients are known to fp32 no better than to 1e-4, on one rank.
    """
    options = small_options(name)
    return {"mixer": name, "init_std": 0.02, "mixer_options": {name: options} if options else {}}


SMALL: dict[str, dict[str, Any]] = {
    "pattern": {"layers": "[gated_retention, softmax, conv] * 2", "init_std": 0.05},
    "rmt": {"recurrence": {"kind": "rmt", "segment": 11, "memory": 3, "curriculum": ((0, 1), (1, 2), (3, 4))}},
    "armt": {"recurrence": {"kind": "armt", "segment": 11, "memory": 3, "keys": 16, "bptt": 2}},
    "wavefront": {"recurrence": {"kind": "armt", "segment": 11, "memory": 3, "keys": 16, "wavefront": True}},
}
LARGE: dict[str, dict[str, Any]] = {
    "kv_bias": {"mixer": "softmax", "init_std": 0.05, "mixer_options": {"softmax": {"kv_bias": True}}},
    "block": {"layers": "[softmax, gated_retention]", "block": {"size": 4, "layers": 2}, "init_std": 0.05},
    "sharing": {
        # Two memories in one decoder: the first layer's values, and keys that are gathered once.
        "layers": "[rwkv7, yoco] * 2", "init_std": 0.05,
        "mixer_options": {"rwkv7": {"chunk": 4}, "yoco": {"kv": "gathered"}},
    },
}  # fmt: skip

MODELS = {**{name: two_layers(name) for name in MIXERS}, **LARGE, **SMALL}
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
