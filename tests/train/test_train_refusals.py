"""Bad input to ``longctx train``: one sentence, status 2, no traceback of ours, nothing half-written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import SmallCorpus, build_small

RANKS = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longctx")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return build_small(tmp_path_factory.mktemp("refusals"))


def train(*words: str, module: tuple[str, ...] = ("longctx",)) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", *module, "train", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run=/proc/longctx"], "/proc/longctx cannot be written"),
        (["sequence.length=10m"], "fewer than sequence.length 10000000"),
        (["sequence.degree=2"], "2 does not divide the world of 1 ranks"),
        (["trian.lr=1"], "did you mean"),
    ],
)
def test_refused_before_anything_is_written(small: SmallCorpus, tmp_path: Path, words: list[str], says: str) -> None:
    config = small.write_config(tmp_path / "config.yaml", tmp_path / "run")
    done = train(str(config), *words)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.tier2
def test_a_run_folder_with_another_config_is_kept_as_it_is(small: SmallCorpus, tmp_path: Path) -> None:
    config = small.write_config(tmp_path / "config.yaml", tmp_path / "run")
    assert train(str(config)).returncode == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    done = train(str(config), "train.lr=0.5")
    assert done.returncode == 2
    assert "already holds a run with other settings (train.lr: 0.01 -> 0.5)" in done.stderr
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}


@pytest.mark.tier2
def test_a_shard_altered_for_one_rank_stops_all_with_one_sentence(small: SmallCorpus, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(small.corpus, corpus)
    shard = min(corpus.glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    config = small.write_config(tmp_path / "config.yaml", tmp_path / "run")
    done = train(str(config), f"data.sources.0.path={corpus}", "sequence.degree=2", module=RANKS)
    assert done.returncode != 0
    assert done.stderr.count("error: shard") == 1
    assert f"{shard.stem} of {corpus} is altered" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())
