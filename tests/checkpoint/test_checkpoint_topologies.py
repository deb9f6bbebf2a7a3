"""A checkpoint written by any engine at any topology restores bit for bit in any other, by parameter name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from training import Case, build, full_state, model_config

from longctx.checkpoint.format import list_checkpoints
from longctx.checkpoint.load import load_state, load_weights, restore_engine, restore_rng
from longctx.checkpoint.save import save_checkpoint
from longctx.model.block_transformer import build_native
from longctx.model.proposals import with_proposals
from longctx.train.callbacks import Checkpoints
from longctx.train.trainer import Progress, Trainer

# Odd sizes everywhere: no parameter divides by 2, and no flat group by 2 or 3.
SHAPE = {
    "vocab_size": 59, "hidden_size": 21, "num_heads": 3, "num_kv_heads": 1, "head_dim": 2, "intermediate_size": 37,
    "qk_norm": True, "qkv_bias": True, "family": "qwen3",
}  # fmt: skip
CASE = Case(length=23, fp64=False, batch=6, steps=3, seed=9, lr=1e-2, model=SHAPE)
State = dict[str, torch.Tensor]


def place(kind: str, world: int, degree: int, **more: Any) -> tuple[int, Case]:
    """A world and a case; kind is torch, 0, 1, 2 or 3."""
    engine = {"kind": "torch"} if kind == "torch" else {"kind": "deepspeed", "zero": int(kind)}
    return world, replace(CASE, engine=engine, degree=degree, **more)


def save_at(trainer: Trainer, run: Path) -> Path:
    progress = trainer.progress
    state = {
        "step": progress.step, "tokens": progress.tokens, "nonfinite": progress.nonfinite, "corpora": ["corpus"],
    }  # fmt: skip
    return save_checkpoint(run, trainer.engine, trainer.mesh, trainer.model, state, None)


def train_and_save(case: Case, run: Path, steps: int = 3) -> tuple[State, list[Any]]:
    """Train ``steps``, save, and go on to the end; state at the checkpoint and all records."""
    trainer, watch = build(case)
    trainer.engine.module.train()
    records = [trainer.step() for _ in range(steps)]
    save_at(trainer, run)
    state = full_state(trainer)
    trainer.run()
    return state, records + watch.records


def resume(case: Case, run: Path) -> tuple[State, list[Any], State]:
    """Restore the newest checkpoint and train to the end; the state restored, the records, the final state."""
    checkpoint = list_checkpoints(run)[-1]
    saved = load_state(checkpoint)
    trainer, watch = build(case, weights=lambda model: load_weights(checkpoint, model))
    restore_engine(checkpoint, trainer.engine, saved["updates"])
    restore_rng(checkpoint, trainer.mesh, 0, saved["step"])
    trainer.progress = Progress(saved["step"], saved["tokens"], saved["nonfinite"])
    restored = full_state(trainer)
    trainer.run()
    return restored, watch.records, full_state(trainer)


def assert_same_bits(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


SAVED = [("torch", 2, 2), ("0", 3, 3), ("1", 2, 1), ("2", 3, 1), ("3", 2, 2), ("3", 3, 3)]
LOADED = [("torch", 1, 1), ("0", 2, 2), ("1", 3, 3), ("2", 2, 2), ("3", 3, 1), ("3", 1, 1), ("1", 1, 1)]
QUICK = {(("torch", 2, 2), ("3", 3, 1)), (("3", 2, 2), ("1", 3, 3)), (("1", 2, 1), ("torch", 1, 1)),
         (("2", 3, 1), ("0", 2, 2))}  # fmt: skip
PAIRS = [
    pytest.param(saved, loaded, marks=() if (saved, loaded) in QUICK else pytest.mark.tier2)
    for saved in SAVED
    for loaded in LOADED
]


@pytest.mark.parametrize("saved, loaded", PAIRS)
def test_state_is_the_same_bits_at_any_other_topology(pool: Pool, tmp_path: Path, saved: Any, loaded: Any) -> None:
    world, case = place(*saved)
    wanted, _ = pool.run(train_and_save, world, case, tmp_path)[0]
    world, case = place(*loaded)
    restored, _, _ = pool.run(resume, world, case, tmp_path)[0]
    assert_same_bits(restored, wanted)
    assert restored["updates"] == 3


@pytest.mark.parametrize("kind, precision", [("torch", "fp32"), *(
    pytest.param(str(stage), precision, marks=() if (stage, precision) in {(1, "fp32"), (3, "bf16"), (0, "bf16")}
                 else pytest.mark.tier2)
    for stage in range(4) for precision in ("fp32", "bf16")
)])  # fmt: skip
def test_resume_at_the_same_topology_repeats_every_digit(pool: Pool, tmp_path: Path, kind: str, precision: str) -> None:
    world, case = place(kind, 2, 2, steps=6, precision=precision)
    _, straight = pool.run(train_and_save, world, case, tmp_path)[0]
    _, resumed, _ = pool.run(resume, world, case, tmp_path)[0]
    for key in ("step", "loss", "grad_norm", "lr", "tokens", "data_hash", "skipped"):
        assert [r[key] for r in resumed] == [r[key] for r in straight[3:]], key
    assert len(resumed) == 3


@pytest.mark.parametrize(
    "saved, loaded", [(("1", 2, 2), ("3", 3, 3)), pytest.param(("3", 3, 1), ("torch", 1, 1), marks=pytest.mark.tier2),
                      pytest.param(("2", 2, 1), ("0", 2, 2), marks=pytest.mark.tier2)]
)  # fmt: skip
def test_resume_at_another_topology_reads_the_same_tokens(pool: Pool, tmp_path: Path, saved: Any, loaded: Any) -> None:
    world, case = place(*saved, steps=6, lr=1e-3)
    _, straight = pool.run(train_and_save, world, case, tmp_path)[0]
    world, case = place(*loaded, steps=6, lr=1e-3)
    _, resumed, _ = pool.run(resume, world, case, tmp_path)[0]
    for key in ("step", "tokens", "data_hash", "lr"):
        assert [r[key] for r in resumed] == [r[key] for r in straight[3:]], key
    assert [r["loss"] for r in resumed] == pytest.approx([r["loss"] for r in straight[3:]], rel=1e-5)


def save_before_any_update(case: Case, run: Path) -> State:
    trainer, _ = build(case)
    save_at(trainer, run)
    return full_state(trainer)


@pytest.mark.parametrize("kind", ["torch", "0", "1", "3"])
def test_a_checkpoint_may_precede_the_first_update(pool: Pool, tmp_path: Path, kind: str) -> None:
    """Bug: with the first update skipped there were no moments to save. Fix: engines make them when built."""
    world, case = place(kind, 2, 2)
    wanted = pool.run(save_before_any_update, world, case, tmp_path)[0]
    restored, records, _ = pool.run(resume, world, case, tmp_path)[0]
    assert_same_bits(restored, wanted)
    assert restored["updates"] == 0
    assert len(records) == 3


def draws(case: Case, run: Path, restore: bool) -> list[float]:
    """Random numbers drawn after saving, or after restoring."""
    torch.manual_seed(1000 + torch.distributed.get_rank())
    torch.rand(5)
    trainer, _ = build(case)
    if restore:
        restore_rng(list_checkpoints(run)[-1], trainer.mesh, 0, 0)
    else:
        save_at(trainer, run)
    drawn: list[float] = torch.rand(3).tolist()
    return drawn


def test_every_rank_gets_its_random_numbers_back(pool: Pool, tmp_path: Path) -> None:
    world, case = place("torch", 2, 2)
    wanted = pool.run(draws, world, case, tmp_path, False)
    assert wanted[0] != wanted[1]
    assert pool.run(draws, world, case, tmp_path, True) == wanted
    # A rank that did not exist draws numbers of its own, the same ones each time.
    world, case = place("torch", 3, 3)
    wider = pool.run(draws, world, case, tmp_path, True)
    assert wider[:2] == wanted
    assert wider[2] not in wanted
    assert pool.run(draws, world, case, tmp_path, True) == wider


def run_with_checkpoints(case: Case, run: Path, tokenizer: Path) -> list[str]:
    trainer, watch = build(case)
    config = trainer.config.model_copy(
        update={"checkpoint": trainer.config.checkpoint.model_copy(update={"every": 2, "keep": 2})}
    )
    trainer.config, trainer.callbacks = config, [watch, Checkpoints(run, tokenizer, ["corpus"])]
    trainer.run()
    return [record["path"] for record in watch.events]


def test_checkpoints_come_when_asked_and_the_newest_are_kept(pool: Pool, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    stale = tmp_path / "run" / "checkpoints" / ".writing-step-00000001"
    stale.mkdir(parents=True)
    world, case = place("1", 2, 2, steps=7)
    paths, _ = pool.run(run_with_checkpoints, world, case, tmp_path / "run", tokenizer)
    names = [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert [Path(path).name for path in paths] == names
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == names[-2:]
    last = tmp_path / "run" / "checkpoints" / names[-1]
    assert (last / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert json.loads((last / "state.json").read_text()) == {
        "version": 1, "updates": 7, "step": 7, "tokens": 7 * 6 * 23, "nonfinite": 0, "corpora": ["corpus"],
    }  # fmt: skip


PROPOSING = {**SHAPE, "proposals": {"heads": 2, "width": 13, "base": "frozen"}}


@pytest.mark.parametrize("saved, loaded, precision", [
    (("3", 2, 2), ("1", 3, 3), "fp32"), (("torch", 2, 1), ("3", 2, 2), "fp32"),
    pytest.param(("1", 2, 2), ("torch", 1, 1), "fp32", marks=pytest.mark.tier2),
    pytest.param(("0", 2, 2), ("2", 2, 1), "bf16", marks=pytest.mark.tier2),
    pytest.param(("2", 2, 2), ("0", 2, 2), "bf16", marks=pytest.mark.tier2),
    pytest.param(("3", 2, 2), ("1", 2, 2), "bf16", marks=pytest.mark.tier2),
])  # fmt: skip
def test_a_frozen_decoder_is_saved_beside_its_heads(
    pool: Pool, tmp_path: Path, saved: Any, loaded: Any, precision: str
) -> None:
    """Whole, once, unrounded and without moments, by engines that partition or round what they do not train."""
    world, case = place(*saved, model=PROPOSING, precision=precision)
    wanted, _ = pool.run(train_and_save, world, case, tmp_path)[0]
    moments = [name for name in wanted if name.startswith("exp_avg ")]
    assert len(moments) == 8 and all("proposals" in name for name in moments)
    drawn = {f"weight {name}": tensor for name, tensor in drawn_weights(case).items()}
    decoder = [name for name in wanted if name.startswith("weight decoder.")]
    assert_same_bits({name: wanted[name] for name in decoder}, {name: drawn[name] for name in decoder})
    assert set(drawn) == set(decoder) | {name.replace("exp_avg", "weight") for name in moments}
    world, case = place(*loaded, model=PROPOSING, precision=precision)
    restored, _, _ = pool.run(resume, world, case, tmp_path)[0]
    assert_same_bits(restored, wanted)


def drawn_weights(case: Case) -> State:
    model = with_proposals(build_native(model_config(case), seed=case.seed), case.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_run_with_heads_goes_on_bit_by_bit(pool: Pool, tmp_path: Path) -> None:
    model = {**SHAPE, "proposals": {"heads": 2, "width": 13}}
    world, case = place("3", 2, 2, steps=6, model=model)
    _, straight = pool.run(train_and_save, world, case, tmp_path)[0]
    _, resumed, _ = pool.run(resume, world, case, tmp_path)[0]
    for key in ("loss", "proposal_loss", "grad_norm", "data_hash"):
        assert [r[key] for r in resumed] == [r[key] for r in straight[3:]], key
