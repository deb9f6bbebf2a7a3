"""What mixers learn beside gradients (Transformer-VQ's codes and commitment) is the same however training is cut.

Strategy: law 1 as for weights, on the averages behind the codes; once per optimizer step, over all ranks and
micro-batches, also where activations are recomputed. The oracle absorbs by hand what one rank observes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from safetensors.torch import load_file
from test_invisible_sharding_deepspeed import deepspeed
from torch import Tensor
from training import Case, build, full_weights, model_config

from longctx.checkpoint.format import list_checkpoints
from longctx.checkpoint.load import load_state, load_weights, restore_engine
from longctx.checkpoint.save import save_checkpoint
from longctx.errors import CheckpointError
from longctx.mixers.statistics import Observed, statistics_of
from longctx.model.hf import empty_model
from longctx.train import trainer as trainer_module
from longctx.train.trainer import Progress, Trainer

# A commitment so heavy that its gradient shows.
OPTIONS = {"chunk": 4, "codes": 7, "commitment": 0.3}
VQ = {"mixer": "transformer_vq", "init_std": 0.1, "mixer_options": {"transformer_vq": OPTIONS}}
CASE = Case(length=37, batch=2, micro_batch=1, steps=5, model=VQ, lr=1e-3)


@dataclass(frozen=True)
class Run:
    """Records, averages behind the codes and weights after the last step."""

    records: list[dict[str, Any]]
    averages: dict[str, Tensor]
    weights: dict[str, Tensor]


def result_of(trainer: Trainer, records: list[dict[str, Any]]) -> Run:
    averages = {name: buffer.clone() for name, buffer in statistics_of(trainer.engine.module).items()}
    return Run(records, averages, full_weights(trainer))


def train(case: Case) -> Run:
    trainer, watch = build(case)
    trainer.run()
    return result_of(trainer, watch.records)


def train_without_reduction(case: Case) -> Run:
    """The planted fault: every rank takes in its own sums."""
    honest = trainer_module.over_ranks

    def local(observed: Observed, mesh: Any) -> Observed:
        return Observed(honest(observed, mesh).loss_sum, observed.sums)

    trainer_module.over_ranks = local
    try:
        return train(case)
    finally:
        trainer_module.over_ranks = honest


def differences(found: Run, wanted: Run) -> dict[str, float]:
    """Largest relative difference of losses, averages and weights."""
    pairs: dict[str, list[Any]] = {"averages": [], "weights": []}
    for key in ("loss", "auxiliary_loss", "grad_norm"):
        both = zip(found.records, wanted.records, strict=True)
        pairs[key] = [tuple(torch.tensor(r[key], dtype=torch.float64) for r in pair) for pair in both]
    for kind in ("averages", "weights"):
        ours, theirs = getattr(found, kind), getattr(wanted, kind)
        assert ours.keys() == theirs.keys() and ours
        pairs[kind] = [(ours[name], theirs[name]) for name in theirs]
    return {
        kind: max(float((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-4)) for a, b in both)
        for kind, both in pairs.items()
    }


@pytest.fixture(scope="module")
def wanted(pool: Pool) -> Callable[[Case], Run]:
    """The run of a case on one rank, once."""
    kept: dict[str, Run] = {}

    def of(case: Case) -> Run:
        key = str(case)
        if key not in kept:
            kept[key] = pool.run(train, 1, case)[0]
        return kept[key]

    return of


@pytest.mark.parametrize(
    ("world", "change"),
    [
        (1, {"recompute": True}),
        (2, {"degree": 2, "recompute": True}),
        (2, {"degree": 1}),
        (3, {"degree": 3, "layout": "balanced"}),
    ],
    ids=["recomputed", "sequence 2", "data 2", "sequence 3"],
)
def test_codes_averages_and_losses_agree(
    world: int, change: dict[str, Any], wanted: Callable[[Case], Run], pool: Pool, seed: int
) -> None:
    """Two rows per step: two micro-batches, or one on each data rank; every rank holds the same bits."""
    case = replace(CASE, seed=seed)
    ranks = pool.run(train, world, replace(case, **change))
    assert max(differences(ranks[0], wanted(case)).values()) < 1e-10
    for rank in ranks[1:]:
        assert all(torch.equal(rank.averages[name], t) for name, t in ranks[0].averages.items())


def test_sums_that_are_not_reduced_are_noticed(wanted: Callable[[Case], Run], pool: Pool, seed: int) -> None:
    case = replace(CASE, seed=seed)
    ranks = pool.run(train_without_reduction, 2, replace(case, degree=2))
    assert differences(ranks[0], wanted(case))["averages"] > 1e-3
    assert any(not torch.equal(ranks[1].averages[name], t) for name, t in ranks[0].averages.items())


def test_a_step_takes_in_what_its_tokens_say_once(seed: int, pool: Pool) -> None:
    assert pool.run(one_step_by_hand, 1, replace(CASE, seed=seed, recompute=True))[0] < 1e-12


def one_step_by_hand(case: Case) -> float:
    """Largest error of codes, gradients and losses after one step, against two forwards of whole rows by hand."""
    trainer, _ = build(case)
    model, labels, tokens = trainer.engine.module, 0, 0
    rows = [trainer.rows.whole(row) for row in range(2)]  # type: ignore[attr-defined]
    outputs = []
    for row, (ids, targets) in enumerate(rows):
        context = trainer.context((trainer.rows.documents(row),))
        outputs.append(model(torch.from_numpy(ids)[None], context, torch.from_numpy(targets)[None]))
        labels, tokens = labels + int((targets != -100).sum()), tokens + len(ids)
    token_loss = sum(o.loss_sum for o in outputs) / labels
    auxiliary = sum(o.observed.loss_sum for o in outputs) / tokens
    (token_loss + auxiliary).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    model.zero_grad()
    expected = {}
    for layer in range(2):
        count, total = (model.get_buffer(f"layers.{layer}.mixer.codebook.{n}") for n in ("count_HK", "total_HKE"))
        found = sum(o.observed.sums[f"layers.{layer}.mixer.codebook"].detach() for o in outputs)
        expected[f"layers.{layer}.mixer.codebook.count_HK"] = 0.99 * count + 0.01 * found[..., -1]
        expected[f"layers.{layer}.mixer.codebook.total_HKE"] = 0.99 * total + 0.01 * found[..., :-1]
    record = trainer.step()
    assert float(auxiliary) > 0.1
    errors = [abs(record["loss"] - float(token_loss)), abs(record["auxiliary_loss"] - float(auxiliary))]
    errors += [abs(record["grad_norm"] - float(norm))]
    errors += [float((model.get_buffer(name) - t).abs().max()) for name, t in expected.items()]
    return max(errors)


def test_a_step_that_is_skipped_moves_no_code(seed: int, pool: Pool) -> None:
    assert pool.run(skipped_step, 1, replace(CASE, seed=seed))[0]


def skipped_step(case: Case) -> bool:
    trainer, _ = build(case)
    before = {name: t.clone() for name, t in statistics_of(trainer.engine.module).items()}
    with torch.no_grad():
        trainer.engine.module.head.weight[0, 0] = float("inf")  # type: ignore[union-attr, index, operator]
    assert trainer.step()["skipped"]
    return all(torch.equal(t, before[name]) for name, t in statistics_of(trainer.engine.module).items())


def test_evaluation_observes_nothing(seed: int, pool: Pool) -> None:
    assert pool.run(evaluated, 1, replace(CASE, seed=seed))[0]


def evaluated(case: Case) -> bool:
    trainer, _ = build(case)
    before = {name: t.clone() for name, t in statistics_of(trainer.engine.module).items()}
    trainer.evaluate(trainer.rows, 2)
    return all(torch.equal(t, before[name]) for name, t in statistics_of(trainer.engine.module).items())


def train_and_save(case: Case, run: Path) -> Run:
    """Two steps, a checkpoint, and on to the end."""
    trainer, watch = build(case)
    trainer.engine.module.train()
    for _ in range(2):
        trainer.step()
    state = {"step": 2, "tokens": trainer.progress.tokens, "nonfinite": 0, "corpora": []}
    save_checkpoint(run, trainer.engine, trainer.mesh, trainer.model, state, None)
    trainer.run()
    return result_of(trainer, watch.records)


def resume(case: Case, run: Path) -> Run:
    """From the checkpoint to the end; whatever the model held before is overwritten."""
    checkpoint = list_checkpoints(run)[-1]
    trainer, watch = build(case, lambda model: load_weights(checkpoint, model))
    saved = load_state(checkpoint)
    restore_engine(checkpoint, trainer.engine, saved["updates"])
    trainer.progress = Progress(saved["step"], saved["tokens"], saved["nonfinite"])
    trainer.run()
    return result_of(trainer, watch.records)


@pytest.mark.parametrize(
    "change",
    [{}, *(pytest.param({"engine": deepspeed(s), "fp64": False}, marks=pytest.mark.tier2) for s in (0, 1, 3))],
    ids=["torch", "ZeRO 0", "ZeRO 1", "ZeRO 3"],
)
def test_resume_repeats_every_digit(change: dict[str, Any], seed: int, pool: Pool, tmp_path: Path) -> None:
    case = replace(CASE, seed=seed, degree=2, **change)
    straight = pool.run(train_and_save, 2, case, tmp_path, limit_s=120)[0]
    resumed = pool.run(resume, 2, case, tmp_path, limit_s=120)[0]
    for kind in ("averages", "weights"):
        ours, theirs = getattr(resumed, kind), getattr(straight, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), kind
    for key in ("loss", "auxiliary_loss", "grad_norm"):
        assert [r[key] for r in resumed.records] == [r[key] for r in straight.records], key


def test_a_checkpoint_holds_the_codes_for_evaluation(seed: int, pool: Pool, tmp_path: Path) -> None:
    """A model built without memory, as for evaluation; one with codes of another kind or number is refused."""
    case = replace(CASE, seed=seed)
    pool.run(train_and_save, 1, case, tmp_path)
    checkpoint, config = list_checkpoints(tmp_path)[-1], model_config(case)
    model = empty_model(config).to_empty(device="cpu")
    load_weights(checkpoint, model)
    stored = load_file(checkpoint / "statistics-00000.safetensors")
    assert len(stored) == 4 and stored.keys() == statistics_of(model).keys()
    assert all(torch.equal(buffer, stored[name].float()) for name, buffer in statistics_of(model).items())
    for change, says in (({"codebook": "gradient"}, "codebook.weight"), ({"codes": 5}, "has shape")):
        other = config.model_copy(update={"mixer_options": {"transformer_vq": {**OPTIONS, **change}}})
        with pytest.raises(CheckpointError, match=says):
            load_weights(checkpoint, empty_model(other).to_empty(device="cpu"))


@pytest.mark.tier2
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_agrees(stage: int, wanted: Callable[[Case], Run], pool: Pool) -> None:
    case = replace(CASE, fp64=False, seed=5)
    ranks = pool.run(train, 2, replace(case, degree=2, recompute=True, engine=deepspeed(stage)), limit_s=120)
    assert max(differences(ranks[0], wanted(case)).values()) < 1e-5
    assert all(torch.equal(ranks[1].averages[name], t) for name, t in ranks[0].averages.items())


@pytest.mark.tier2
def test_bf16_keeps_its_averages_in_fp32(pool: Pool) -> None:
    """They follow those of fp32, and small steps are not lost to rounding."""
    case = replace(CASE, fp64=False, seed=5)
    wanted = pool.run(train, 1, case)[0]
    found = pool.run(train, 2, replace(case, degree=2, precision="bf16", engine=deepspeed(1)), limit_s=120)[0]
    for name, average in wanted.averages.items():
        assert found.averages[name].dtype == torch.float32
        assert not torch.equal(found.averages[name], found.averages[name].bfloat16().float())
        # A key in a hundred may have another code.
        assert (found.averages[name] - average).norm() < 0.02 * average.norm()


@pytest.mark.tier2
@pytest.mark.parametrize("kind", ["rmt", "armt"])
def test_a_recurrence_hands_on_what_was_observed(kind: str, wanted: Callable[[Case], Run], pool: Pool) -> None:
    recurrence = {"kind": kind, "segment": 11, "memory": 3} | ({"keys": 4} if kind == "armt" else {})
    case = replace(CASE, seed=3, model={**VQ, "recurrence": recurrence})
    found = pool.run(train, 2, replace(case, degree=2, recompute=True), limit_s=120)[0]
    assert len(found.averages) == 4
    assert max(differences(found, wanted(case)).values()) < 1e-10
