"""Gradient norms, clipping and skipped updates of every engine, against hand computations."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pool import Pool
from training import Case, RandomRows, assert_same_training, build, config_of, full_state, model_config, relative, train

from longctx.errors import ConfigError
from longctx.model.decoder import CausalLM
from longctx.runtime.mesh import alone
from longctx.sequence.context import SequenceContext
from longctx.train.engine import Engine
from longctx.train.flops import flops_per_token
from longctx.train.setup import build_engine
from longctx.train.trainer import TrainingFailed

ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero": stage} for stage in range(4)},
}
IN_FP32 = [pytest.param(engine, "fp32", id=f"{name}-fp32") for name, engine in ENGINES.items()]
IN_BF16 = [pytest.param(engine, "bf16", id=f"{name}-bf16") for name, engine in ENGINES.items() if name != "torch"]
WIDE = pytest.mark.tier2
CASE = Case(length=23, fp64=False, batch=2, steps=1, seed=3)


def by_hand(case: Case) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients of the first step in fp64: one sum over all rows, divided once."""
    shape = model_config(case)
    model = CausalLM(shape, seed=case.seed).double()
    rows = RandomRows(case.length, shape.vocab_size or 0, case.seed)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(case.batch):
        tokens, labels = (torch.from_numpy(part)[None] for part in rows.whole(row))
        context = SequenceContext.single(1, case.length, documents=(rows.documents(row),))
        total = total + model(tokens, context, labels).loss_sum
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    return float(loss.detach()), norm, gradients


def one_step(case: Case) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    trainer, watch = build(case)
    trainer.run()
    return watch.records[0], full_state(trainer)


@pytest.mark.parametrize("engine, precision", IN_FP32)
@pytest.mark.parametrize("world, degree", [(2, 2), *(pytest.param(*w, marks=WIDE) for w in ((1, 1), (2, 1), (3, 3)))])
def test_norm_and_clipped_gradients_are_the_true_ones(
    pool: Pool, engine: dict[str, Any], precision: str, world: int, degree: int
) -> None:
    case = replace(CASE, engine=engine, precision=precision, degree=degree)
    loss, norm, gradients = by_hand(case)
    assert norm > 0.2
    for clip in (0.1, 0.0, 100.0):
        record, state = pool.run(one_step, world, replace(case, clip=clip))[0]
        assert relative(record["loss"], loss) < 1e-6
        assert relative(record["grad_norm"], norm) < 1e-5, "the norm before clipping"
        scale = clip / norm if 0 < clip < norm else 1.0
        for name, gradient in gradients.items():
            # After the first update the first moment is (1 - beta1) times the clipped gradient.
            seen = state[f"exp_avg {name}"].double() / (1 - 0.9)
            wanted = gradient * scale
            assert float((seen - wanted).abs().max()) < 1e-5 * float(wanted.abs().max()), (name, clip)
        assert state["updates"] == 1


class _Poison(torch.autograd.Function):
    """The identity whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.factor, None


def poison(engine: Engine, rank: int, what: str) -> None:
    """Spoil the next forward on one rank: its loss, or only the gradient that flows back from it."""
    if torch.distributed.get_rank() != rank:
        return
    forward = engine.forward

    def spoiled(*args: Any) -> Any:
        engine.forward = forward  # type: ignore[method-assign]
        output = forward(*args)
        loss = output.loss_sum
        spoiled_loss = loss * math.nan if what == "nan loss" else _Poison.apply(loss, float(what.split()[0]))
        return output._replace(loss_sum=spoiled_loss)

    engine.forward = spoiled  # type: ignore[method-assign]


def skip_one(case: Case, what: str) -> Any:
    """Three steps whose second is spoiled on the last rank; the state before and after it and at the end."""
    trainer, _ = build(case)
    trainer.engine.module.train()
    records = [trainer.step()]
    before = full_state(trainer)
    poison(trainer.engine, torch.distributed.get_world_size() - 1, what)
    records.append(trainer.step())
    after = full_state(trainer)
    records.append(trainer.step())
    return records, before, after, full_state(trainer), trainer.progress


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    "what", ["nan gradient", pytest.param("nan loss", marks=WIDE), pytest.param("inf gradient", marks=WIDE)]
)
@pytest.mark.parametrize("engine, precision", IN_FP32 + IN_BF16)
def test_a_spoiled_step_on_one_rank_changes_no_bit_anywhere(
    pool: Pool, engine: dict[str, Any], precision: str, what: str
) -> None:
    case = replace(CASE, engine=engine, precision=precision, degree=2, steps=9)
    for records, before, after, end, progress in pool.run(skip_one, 2, case, what):
        assert same_bits(before, after) == []
        assert [record["skipped"] for record in records] == [False, True, False]
        assert (records[1]["loss"] is None) == (what == "nan loss")
        assert records[1]["grad_norm"] is None
        assert (progress.step, progress.nonfinite, int(end["updates"])) == (3, 1, 2)
        # The step after it trains: every matrix moves, and nothing of the spoiled step is left in it.
        assert records[2]["grad_norm"] > 0
        assert all(torch.isfinite(tensor).all() for tensor in end.values())
        matrices = [name for name, tensor in end.items() if name.startswith("weight") and tensor.dim() > 1]
        assert set(matrices) <= set(same_bits(after, end))


@WIDE
@pytest.mark.parametrize("engine, precision", IN_FP32[1:])
def test_after_a_skipped_step_engines_still_agree(pool: Pool, engine: dict[str, Any], precision: str) -> None:
    case = replace(CASE, precision=precision, degree=2, steps=9)
    wanted = pool.run(skip_one, 2, replace(case, engine=ENGINES["torch"]), "nan gradient")[0]
    found = pool.run(skip_one, 2, replace(case, engine=engine), "nan gradient")[0]
    assert relative(found[0][2]["grad_norm"], wanted[0][2]["grad_norm"]) < 1e-5
    for name, tensor in wanted[3].items():
        scale = max(float(tensor.abs().max()), 1e-8)
        assert float((found[3][name] - tensor).abs().max()) / scale < 1e-5, name


def spoil_until_it_fails(case: Case) -> tuple[str, int]:
    trainer, watch = build(case)
    run_step = trainer.step

    def step() -> Any:
        if trainer.progress.step:
            poison(trainer.engine, 1, "nan loss")
        return run_step()

    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingFailed) as caught:
        trainer.run()
    return str(caught.value), len(watch.records)


@pytest.mark.parametrize("allowed", [0, 2])
def test_the_run_ends_after_too_many_skipped_steps(pool: Pool, allowed: int) -> None:
    case = replace(CASE, engine=ENGINES["zero1"], degree=2, steps=9, max_nonfinite=allowed)
    for message, records in pool.run(spoil_until_it_fails, 2, case):
        assert message.startswith(f"step {allowed + 2}: {allowed + 1} updates were skipped")
        assert f"train.max_nonfinite = {allowed}" in message and "\n" not in message
        assert records == allowed + 2, "the last step is logged before the run ends"


def test_skipped_steps_are_logged_even_between_log_steps(pool: Pool) -> None:
    case = replace(CASE, engine=ENGINES["torch"], steps=3)
    (steps,) = pool.run(logged_steps, 1, case)
    assert steps == [2, 3]


def logged_steps(case: Case) -> list[int]:
    trainer, watch = build(case)
    train_ = trainer.config.train.model_copy(update={"log_every": 3})
    trainer.config = trainer.config.model_copy(update={"train": train_})
    run_step = trainer.step

    def step() -> Any:
        if trainer.progress.step == 1:
            poison(trainer.engine, 0, "nan gradient")
        return run_step()

    trainer.step = step  # type: ignore[method-assign]
    trainer.run()
    return [record["step"] for record in watch.records]


def test_the_torch_engine_refuses_bf16() -> None:

    case = replace(CASE, precision="bf16")
    with pytest.raises(ConfigError, match=r"torch trains in fp32 only; use .* engine\.kind=deepspeed"):
        build_engine(config_of(case), CausalLM(model_config(case)), alone())


@pytest.mark.parametrize("engine, precision", IN_FP32)
def test_one_process_trains_like_several(pool: Pool, engine: dict[str, Any], precision: str) -> None:
    case = replace(CASE, steps=4, lr=1e-3, engine=engine)
    (wanted,) = pool.run(train, 1, replace(case, engine=ENGINES["torch"]))
    (found,) = pool.run(train, 1, case)
    assert_same_training(found, wanted, 1e-5)


def _mfu_of_a_step(case: Case, peak: float) -> tuple[float, float, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longctx.train.trainer.peak_flops", lambda name, precision: peak)
        trainer, watch = build(case)
        trainer.run()
    parameters = sum(p.numel() for p in trainer.engine.module.parameters())
    return watch.records[0]["mfu"], watch.records[0]["tokens_per_second"], parameters


@pytest.mark.parametrize("world", [1, 2])
def test_mfu_is_the_share_of_all_devices_peak(pool: Pool, world: int) -> None:
    case = replace(CASE, engine={"kind": "torch"}, degree=world)
    peak = 3e9
    mfu, rate, parameters = pool.run(_mfu_of_a_step, world, case, peak)[0]
    assert mfu == pytest.approx(flops_per_token(model_config(case), parameters, case.length) * rate / (peak * world))
