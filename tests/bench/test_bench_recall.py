"""``longctx bench recall``: its rows ask for what they hold and grow as planned; ranks train as one process does."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import Pool

from longctx.bench.recall import ASK, SYMBOLS, Facts, Plan, Recall, recall
from longctx.cli.main import main
from longctx.model.head import IGNORED
from longctx.runtime.mesh import build_mesh

SMALL = Plan(segments=4, segment=8, steps=6, shorter=2, batch=4, width=16, layers=1, memory=2)


def test_every_segment_asks_for_the_one_fact(seed: int) -> None:
    facts, found = Facts(3, 8, seed), set()
    for row in range(40):
        tokens, labels = facts.read(row, [(0, 24)])
        fact = tokens[(tokens >= SYMBOLS) & (tokens < ASK)]
        assert len(fact) == 1 and fact[0] in tokens[:7]
        assert np.flatnonzero(tokens == ASK).tolist() == [7, 15, 23] == np.flatnonzero(labels != IGNORED).tolist()
        assert set(labels[labels != IGNORED]) == set(fact)
        pieces = [facts.read(row, [run]) for run in ((0, 5), (5, 24))]
        assert np.array_equal(np.concatenate([piece for piece, _ in pieces]), tokens)
        found.add(int(fact[0]))
    assert len(found) > 5


def test_rows_double_and_stay_long() -> None:
    assert Plan(segments=16).stages() == [(100, 2), (200, 4), (300, 8), (500, 16)]
    assert Plan(segments=12, steps=150).stages() == [(100, 2), (150, 4), (150, 8), (150, 12)]
    assert Plan(segments=1, steps=7).stages() == [(7, 1)]


def trained(kind: str, seed: int) -> Recall:
    torch.set_num_threads(1)
    world = dist.get_world_size()
    return recall(kind, dataclasses.replace(SMALL, seed=seed), build_mesh(world, torch.device("cpu"), 60))


@pytest.mark.parametrize("kind", ["none", "rmt", "armt"])
def test_ranks_train_as_one_process_does(kind: str, pool: Pool, seed: int) -> None:
    one, two = pool.run(trained, 1, kind, seed)[0], pool.run(trained, 2, kind, seed)
    assert len(one.losses) == 6 and set(one.further) == {4, 8, 16} and len(one.accuracy) == 4
    for found in two:
        np.testing.assert_allclose(found.losses, one.losses, rtol=1e-4)
        # An answer may change where two are equally likely but for rounding: one of 256.
        np.testing.assert_allclose(found.accuracy, one.accuracy, atol=1.5 / 256)


@pytest.mark.tier2
def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert main(["bench", "recall", "--kinds", "none", "--segments", "2", "--steps", "3", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row["kind"] == "none" and len(row["losses"]) == 3 and list(row["further"]) == ["2", "4", "8"]
    assert f"| none | {row['further']['2']:.3f} |" in capsys.readouterr().out
    assert main(["bench", "recall", "--kinds", "xl"]) == 2
    assert "choose from none, rmt, armt" in capsys.readouterr().err
