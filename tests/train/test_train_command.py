"""``longctx train`` as a user runs it: alone and under torchrun, well and with every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from corpora import SmallCorpus, build_small

from longctx.cli.main import main
from longctx.config.load import dump_config, load_config
from longctx.config.schema import Config, Model, Rope
from longctx.model.decoder import CausalLM
from longctx.model.hf_save import save_hf
from longctx.train.setup import resolve_model

SHAPE = Model(
    vocab_size=20, hidden_size=8, num_layers=1, num_heads=2, max_position_embeddings=64, rope=Rope(rope_theta=5e5)
)
DEEPSPEED = {"kind": "deepspeed", "zero": 2}


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def command(ranks: int, *words: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "longctx", "train", *map(str, words)]


def run(ranks: int, *words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(ranks, *words), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def refused(config: Path, said: str, capsys: pytest.CaptureFixture[str], *overrides: str, problems: int = 1) -> None:
    """In this process: status 2 and one line per problem, before torch or the run folder are touched."""
    assert main(["train", str(config), *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == problems and all(line.startswith("error: ") for line in lines)
    assert said in lines[0]
    assert not (config.parent / "run").exists()


@pytest.fixture
def config(small: SmallCorpus, tmp_path: Path) -> Path:
    return small.write_config(tmp_path / "c.yaml", tmp_path / "run")


def test_a_mistyped_key(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(config, "did you mean train.steps?", capsys, "train.step=3")


def test_a_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(tmp_path / "none.yaml", "none.yaml", capsys)


def test_a_missing_corpus(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(config, "the corpus /nowhere does not exist", capsys, "data.sources=[{path: /nowhere}]")


def test_a_sequence_longer_than_the_data(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(config, "fewer than sequence.length 10000000", capsys, "sequence.length=10M")


def test_a_run_below_a_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(config, "is a file", capsys, f"run={config}/run")


def test_a_run_that_cannot_be_written(config: Path) -> None:
    done = run(1, config, "run=/proc/longctx")
    assert done.returncode == 2
    assert "run: /proc/longctx" in one_error(done)


def test_corpora_of_two_tokenizers(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = build_small(tmp_path / "other", seed=3, vocab_size=300)
    first = yaml.safe_load(config.read_text())["data"]["sources"][0]["path"]
    sources = f"data.sources=[{{path: {first}}}, {{path: {other.corpus}}}]"
    refused(config, "were built with different tokenizers", capsys, sources)


def test_an_unsupported_architecture(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "bert"}))
    (folder / "model.safetensors").write_bytes(b"")
    values = yaml.safe_load(config.read_text())
    values["model"] = {"from_hf": str(folder)}
    config.write_text(yaml.safe_dump(values))
    refused(config, "BertForMaskedLM", capsys)


def test_settings_beside_an_hf_folder_count_even_when_they_are_the_defaults(tmp_path: Path) -> None:
    """Bug: ``model.rope.rope_theta=10000`` beside model.from_hf was dropped because it equals the schema's default.

    Fix: what counts is whether it was set. Strategy: a folder with another base, with and without the setting, also
    read back from the stored config.
    """
    folder = tmp_path / "hf"
    save_hf(CausalLM(SHAPE, seed=0), SHAPE, folder)
    tokenizer = SimpleNamespace(vocab_size=20, eos_id=1, bos_id=None)
    for rope, theta in (({}, 5e5), ({"rope": {"rope_theta": 10_000}}, 1e4)):
        values = {"run": "r", "data": {"sources": [{"path": "c"}]}, "sequence": {"length": 8}, "train": {"steps": 1}}
        config = Config.model_validate({**values, "model": {"from_hf": str(folder), **rope}})
        stored = tmp_path / "stored.yaml"
        stored.write_text(dump_config(config))
        for read in (config, load_config(stored)):
            model = resolve_model(read, tokenizer)  # type: ignore[arg-type]
            assert (model.rope.rope_theta, model.max_position_embeddings) == (theta, 64)


def test_a_degree_that_does_not_divide_the_world(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused(config, "3 does not divide the world of 4 ranks; use one of 1, 2, 4", capsys, "sequence.degree=3")
    # The other ranks of the node find the same and stop without a word.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("longctx.cli.options._GIVE_WAY_S", 0)
    assert main(["train", str(config), "sequence.degree=3"]) == 2
    assert capsys.readouterr().err == ""


def test_a_half_set_environment(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    refused(config, "torchrun started this process but WORLD_SIZE is not set", capsys)


def test_cuda_where_there_is_none(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(config, "torch finds no CUDA device", capsys, "runtime.device=cuda")


@pytest.mark.parametrize("options, said", [
    ("{zero_optimization: {stage: 3}}", "may not set zero_optimization.stage"),
    ("{bf16: {enabled: true}}", "may not set bf16"),
    ("{zero_optimization: {offload_optimizer: {device: nvme}}}", "may not use offload_optimizer"),
])  # fmt: skip
def test_deepspeed_settings_that_would_work_against_us(
    config: Path, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    refused(config, said, capsys, f"engine.options={options}")


@pytest.mark.tier2
def test_train_and_go_on_under_torchrun(small: SmallCorpus, tmp_path: Path) -> None:
    """Two ranks, ZeRO-2: nothing of the libraries' chatter on stdout, and a second start finds nothing left to do."""
    file = small.write_config(tmp_path / "c.yaml", tmp_path / "run", engine=DEEPSPEED, sequence={"degree": 2})
    done = run(2, file, "train.precision=bf16", "engine.zero=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    resolved = lines.index("")
    assert all(line.startswith("step ") for line in lines[resolved + 1 :]), done.stdout
    assert done.stderr == ""
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4]
    # Another number of processes goes on, or here: sees that all is done.
    again = run(1, file, "train.precision=bf16", "sequence.degree=1", "engine.zero=3")
    assert again.returncode == 0, again.stderr
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4]
    assert [r["event"] for r in records(tmp_path / "run", "event")][-2:] == ["resume", "end"]


def one_error(done: "subprocess.CompletedProcess[str]") -> str:
    """The one sentence of a failed run; torchrun's own report may follow it, a traceback of ours may not."""
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    ours, _, _ = done.stderr.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert "longctx/" not in ours.replace(said[0], ""), done.stderr
    return said[0]


@pytest.mark.tier2
@pytest.mark.parametrize("rank", [0, 1])
def test_a_corrupt_shard_that_one_rank_finds(small: SmallCorpus, tmp_path: Path, rank: int) -> None:
    copy = replace(small, corpus=tmp_path / "corpus")
    shutil.copytree(small.corpus, copy.corpus)
    shard = sorted(copy.corpus.glob("train-*.bin"))[rank]  # each rank hashes every second shard
    content = bytearray(shard.read_bytes())
    content[5] ^= 4
    shard.write_bytes(content)
    file = copy.write_config(tmp_path / "c.yaml", tmp_path / "run", engine=DEEPSPEED, sequence={"degree": 2})
    started = time.monotonic()
    said = one_error(run(2, file))
    assert f"shard {shard.stem} of {copy.corpus} is altered" in said
    assert time.monotonic() - started < 50, "no rank waits for the one that stopped"
    assert not (tmp_path / "run").exists()


@pytest.mark.tier2
def test_a_run_that_diverges_ends_in_one_sentence(small: SmallCorpus, tmp_path: Path) -> None:
    file = small.write_config(tmp_path / "c.yaml", tmp_path / "run", engine=DEEPSPEED, sequence={"degree": 2})
    done = run(2, file, "train.lr=1e30", "train.steps=30", "train.max_nonfinite=2")
    assert "3 updates were skipped for a non-finite loss or gradient norm" in one_error(done)
    logged = records(tmp_path / "run")
    assert [r["skipped"] for r in logged][-3:] == [True] * 3
    assert logged[-1]["grad_norm"] is None


@pytest.mark.tier2
def test_a_run_folder_of_another_config(small: SmallCorpus, tmp_path: Path) -> None:
    file = small.write_config(tmp_path / "c.yaml", tmp_path / "run", train={"steps": 1})
    assert run(1, file).returncode == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert "train.lr: 0.01 -> 0.5" in one_error(run(1, file, "train.lr=0.5"))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


@pytest.mark.tier2
def test_a_killed_rank_and_what_comes_after(small: SmallCorpus, tmp_path: Path) -> None:
    """SIGKILL one rank between checkpoints: the other says one sentence, and the continued run repeats every digit."""
    sections: dict[str, Any] = {
        "train": {"steps": 400, "schedule": {"kind": "constant"}, "lr": 1e-3}, "checkpoint": {"every": 50},
        "engine": DEEPSPEED, "sequence": {"degree": 2},
    }  # fmt: skip
    file = small.write_config(tmp_path / "c.yaml", tmp_path / "run", **sections)
    log = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command(2, file), env=environment(), stdout=subprocess.DEVNULL, stderr=err)
        try:
            _wait_for(log, '"step": 60')
            os.kill(records(tmp_path / "run", "event")[0]["pids"][1], signal.SIGKILL)
            assert process.wait(60) != 0
        finally:
            process.kill()
    said = [line for line in (tmp_path / "err").read_text().splitlines() if line.startswith("error: ")]
    # torchrun may end the survivor before it notices.
    assert len(said) <= 1 and all("rank 0 lost the other ranks" in line for line in said)
    first = records(tmp_path / "run")
    stopped = first[-1]["step"]
    checkpoint = stopped // 50 * 50
    assert 50 <= checkpoint < 400
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    # Short of 400 steps: enough to repeat what was lost.
    process = subprocess.Popen(command(2, file), env=environment(), stdout=subprocess.DEVNULL)
    try:
        _wait_for(log, f'"step": {stopped + 1}', after=log.stat().st_size)
    finally:
        process.terminate()
        process.wait(60)
    lines = log.read_text(encoding="utf-8").splitlines()[len(first) :]
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    assert any(record.get("event") == "resume" and record["step"] == checkpoint for record in whole)
    before = {r["step"]: r["loss"] for r in first}
    after = {r["step"]: r["loss"] for r in whole if r["kind"] == "train" and checkpoint < r["step"] <= stopped}
    repeated = {step: loss for step, loss in after.items() if step > checkpoint}
    assert set(repeated) == set(range(checkpoint + 1, stopped + 1))
    assert repeated == {step: before[step] for step in repeated}


def _wait_for(file: Path, text: str, after: int = 0, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if file.exists() and text in file.read_bytes()[after:].decode("utf-8", "replace"):
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} never said {text}")
