"""The demonstration on a small corpus, killed rank and all, and its refusals."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from longctx.demo.commands import DemoFailed
from longctx.demo.rehearsal import repeated_steps
from longctx.report.metrics import read_records

SMALL = (
    "sequence.length=512", "train.steps=80", "train.batch=4", "train.lr=5e-3", "train.eval_every=40",
    "checkpoint.every=10", "model.hidden_size=64", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1",
    "model.init_std=0.1", "train.schedule.decay=20",
)  # fmt: skip


def demo(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "longctx", "demo", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.tier2
@pytest.mark.timeout(400)
def test_a_killed_rank_loses_nothing_and_every_artefact_is_there(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for module in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]:
        shutil.copy(module, source)
    done = demo("--out", "demo", "--source", str(source), "--vocab-size", "600", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "losses equal digit for digit" in done.stdout
    run = tmp_path / "demo" / "run"
    events = [record["event"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "event"]
    assert events.count("start") == events.count("resume") == events.count("end") == 1
    for path in (
        "report/index.html",
        "report/loss.png",
        "export/config.json",
        "eval/needle.json",
        "eval/perplexity.json",
    ):
        assert (run / path).stat().st_size > 0
        assert path.split("/")[0] in done.stdout
    again = demo("--out", "demo", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: demo/run already holds a demo")


def write(path: Path, losses: list[tuple[int, float] | str]) -> Path:
    lines = [
        json.dumps({"kind": "event", "step": 0, "event": entry} if isinstance(entry, str)
                   else {"kind": "train", "step": entry[0], "loss": entry[1]})
        for entry in losses
    ]  # fmt: skip
    path.write_text("\n".join(lines) + '\n{"kind": "tr', encoding="utf-8")
    return path


def test_one_digit_of_difference_is_noticed(tmp_path: Path) -> None:
    same = write(tmp_path / "same", ["start", (1, 5.0), (2, 4.1), (3, 3.9), "resume", (2, 4.1), (3, 3.9), (4, 3.0)])
    found = repeated_steps(same)
    assert found.steps == (2, 3)
    assert found.equal
    other = write(tmp_path / "other", ["start", (2, 4.1), (3, 3.9), "resume", (2, 4.1), (3, 3.9000000000000004)])
    assert not repeated_steps(other).equal


@pytest.mark.parametrize("records", [["start", (1, 5.0)], ["start", (1, 5.0), "resume", (2, 4.0)]])
def test_a_kill_that_repeated_nothing_is_no_proof(tmp_path: Path, records: list[tuple[int, float] | str]) -> None:
    with pytest.raises(DemoFailed):
        repeated_steps(write(tmp_path / "metrics", records))


@pytest.mark.parametrize("override", ["train.stpes=9", "checkpoint.every=0"])
def test_a_config_it_cannot_use_costs_no_corpus(tmp_path: Path, override: str) -> None:
    """Bug: a mistyped override was found only after tokenizer and corpus had been built.

    Fix: the plan comes first. Strategy: nothing may have been written.
    """
    done = demo("--out", "demo", override, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and override.split("=")[0] in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_rank_cannot_show_it(tmp_path: Path) -> None:
    done = demo("--ranks", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --ranks 1: the demo cuts sequences over ranks; use at least 2\n"
    assert not list(tmp_path.iterdir())
