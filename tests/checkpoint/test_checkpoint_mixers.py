"""Training of every mixer, recurrence and decoder over blocks goes on from a checkpoint as if it had not stopped.

Strategy: a model that holds nothing but NaN is filled from the folder; from then on each digit of every loss, and at
the end each bit of weights, moments and statistics, must be that of the run that went on.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixer_models import MODELS
from pool import Pool
from test_checkpoint_topologies import assert_same_bits, resume, save_at
from training import Case, build, full_state

# The last step is the first one of a longer curriculum: a run goes on from its step, not from the start.
STEPS, SAVED = 4, 2


def train_and_save(case: Case, run: Path) -> tuple[list[Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train, save on the way, go on to the end; records after the checkpoint, and the states there and at the end."""
    trainer, watch = build(case)
    trainer.engine.module.train()
    for _ in range(SAVED):
        trainer.step()
    save_at(trainer, run)
    saved = full_state(trainer)
    trainer.run()
    return watch.records, saved, full_state(trainer)


@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_bit_by_bit(name: str, pool: Pool, tmp_path: Path, seed: int) -> None:
    case = Case(length=37, fp64=False, steps=STEPS, seed=seed, model=MODELS[name], lr=1e-2)
    straight, saved, end = pool.run(train_and_save, 1, case, tmp_path)[0]
    restored, resumed, found = pool.run(resume, 1, case, tmp_path)[0]
    assert_same_bits(restored, saved)
    assert_same_bits(found, end)
    assert len(resumed) == STEPS - SAVED
    for key in ("step", "tokens", "loss", "auxiliary_loss", "grad_norm", "lr", "data_hash", "skipped"):
        assert [r.get(key) for r in resumed] == [r.get(key) for r in straight], key
    # All that a checkpoint holds has moved since, so that none of it can be missed.
    moved = {key.split()[0] for key in end if not torch.equal(end[key], saved[key])}
    assert moved == {key.split()[0] for key in end}
