"""bf16 training at every ZeRO stage: how far it may be from fp32, what stays in fp32, and what sharding may change.

bf16 keeps 8 bits, so one rounding is off by up to ROUNDING = 2^-8 of a value. Gradients pass through a few dozen
roundings with random signs: a few ROUNDING in the 2-norm. The loss averages over hundreds of tokens: a fraction of it.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pool import Pool
from training import Case, build, full_state, full_weights, relative

ROUNDING = 2.0**-8
CASE = Case(length=61, fp64=False, batch=6, steps=10, seed=3, lr=1e-3, clip=0.0)
OTHER_SPLITS = [(1, 1), (2, 1), (3, 3)]
BETA1 = 0.9
FP32 = {"kind": "torch"}
Run = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def stage(number: int) -> dict[str, Any]:
    return {"kind": "deepspeed", "zero": number}


def run(case: Case) -> Run:
    """Losses, norms, the first step's gradients (first moments over 1 - beta1), and the final state."""
    trainer, watch = build(case)
    record = trainer.step()
    gradients = {
        name.removeprefix("exp_avg "): tensor / (1 - BETA1)
        for name, tensor in full_state(trainer).items()
        if name.startswith("exp_avg ")
    }
    trainer.run()
    records = [record, *watch.records]
    return [r["loss"] for r in records], [r["grad_norm"] for r in records], gradients, full_state(trainer)


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """2-norm of the difference over all tensors, relative."""
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return float((difference / sum(float(t.square().sum()) for t in theirs.values())) ** 0.5)


@pytest.fixture(scope="module")
def fp32(pool: Pool) -> Run:
    found: Run = pool.run(run, 1, replace(CASE, engine=FP32))[0]
    return found


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(stage, marks=pytest.mark.tier2) for stage in (2, 3))])
@pytest.mark.parametrize("world, degree", [(2, 2), *(pytest.param(*s, marks=pytest.mark.tier2) for s in OTHER_SPLITS)])
def test_bf16_follows_fp32(pool: Pool, fp32: Run, number: int, world: int, degree: int) -> None:
    case = replace(CASE, engine=stage(number), precision="bf16", degree=degree)
    losses, norms, gradients, state = pool.run(run, world, case)[0]
    assert relative(losses[0], fp32[0][0]) < ROUNDING / 4
    assert max(relative(a, b) for a, b in zip(losses, fp32[0], strict=True)) < ROUNDING / 2
    assert max(relative(a, b) for a, b in zip(norms, fp32[1], strict=True)) < 10 * ROUNDING
    assert apart(gradients, fp32[2]) < 6 * ROUNDING
    assert losses != fp32[0], "it does not run in fp32"
    assert min(losses) < losses[0] - 0.15, "it learns"
    assert state["updates"] == 10
    weights = [tensor for name, tensor in state.items() if name.startswith("weight")]
    assert all(tensor.dtype == torch.float32 for tensor in weights)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights), "weights keep all 24 bits"


def test_the_tolerance_would_notice_one_wrong_label(pool: Pool, fp32: Run) -> None:
    losses, _, gradients, _ = pool.run(run, 1, replace(CASE, engine=FP32, fault=True))[0]
    assert relative(losses[0], fp32[0][0]) > ROUNDING / 4
    assert apart(gradients, fp32[2]) > 6 * ROUNDING


@pytest.mark.tier2
@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients_are_summed_in_fp32(pool: Pool, number: int) -> None:
    """Rows give the same bf16 gradients wherever they run (in worlds of 2^n, whose factor on the loss rounds nothing),
    so their sum over micro-batches and ranks may differ by what fp32 rounds.
    """
    case = replace(CASE, precision="bf16", steps=1)
    wanted = pool.run(run, 1, replace(case, engine=stage(1)))[0]
    for world in (1, 2):
        found = pool.run(run, world, replace(case, engine=stage(number)))[0]
        assert relative(found[0][0], wanted[0][0]) < 1e-6
        assert relative(found[1][0], wanted[1][0]) < 1e-6
        assert apart(found[2], wanted[2]) < 1e-6


def start(case: Case) -> tuple[dict[str, torch.Tensor], bool, int]:
    """Full-precision weights before the first step; whether the model's own are those rounded; updates so far."""
    trainer, _ = build(case)
    full = full_weights(trainer)
    own = {name: p.detach() for name, p in trainer.engine.module.named_parameters()}
    rounded = all(torch.equal(own[name], full[name].bfloat16()) for name in own if own[name].numel())
    return full, rounded, trainer.engine.updates


@pytest.mark.parametrize("number", range(4))
def test_training_starts_from_the_unrounded_weights(pool: Pool, number: int) -> None:
    wanted, _, _ = pool.run(start, 1, replace(CASE, engine=FP32))[0]
    case = replace(CASE, engine=stage(number), precision="bf16", degree=2)
    for full, rounded, updates in pool.run(start, 2, case):
        assert all(torch.equal(full[name], wanted[name]) for name in wanted)
        assert rounded
        assert updates == 0
