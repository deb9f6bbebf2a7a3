"""`longctx generate` under a launcher: several prompts, and states on disk.

Strategy: torchrun starts two processes on a small real model; their texts are those of one process, which the same
command writes in this one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from longctx.cli.main import main
from longctx.config.schema import Model
from longctx.data.train_tokenizer import train_sentencepiece
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf

OPTIONS = ["--max-tokens", "24", "--device", "cpu"]
TEXT = "def f(self): return value " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer; one layer of two has a window."""
    root = tmp_path_factory.mktemp("model")
    text = Path(__file__).read_text()
    vocab = train_sentencepiece([text[i : i + 500] for i in range(0, len(text), 500)], root / "tok", 350)
    config = Model.model_validate({
        "vocab_size": vocab.tokenizer.vocab_size, "eos_token_id": 2, "hidden_size": 24, "num_layers": 2, "num_heads": 6,
        "num_kv_heads": 3, "head_dim": 4, "intermediate_size": 40, "init_std": 0.2, "max_position_embeddings": 512,
        "sliding_window": 20, "window_layers": [False, True], "family": "qwen3", "qk_norm": True,
    })  # fmt: skip
    save_hf(CausalLM(config, seed=1), config, root / "hf", root / "tok")
    return root / "hf"


def alone(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


def launched(*words: str) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "longctx", "generate", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.tier2
def test_two_processes_continue_several_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that they share and one that is too short for it, of other lengths, so that rows decode unevenly."""
    words = [str(folder), "--prompt", TEXT, "--prompt", "class", *OPTIONS]
    wanted, done = alone(capsys, *words), launched(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == wanted and wanted.startswith("--- 1 ---\n") and "\n--- 2 ---\n" in wanted


@pytest.mark.parametrize("more", [[], ["--keep", "40"]], ids=str)
def test_a_prompt_follows_a_state(
    more: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows the state of a text is what follows both texts at once; saving changes no text."""
    path, again = str(tmp_path / "state"), str(tmp_path / "again")
    first = [str(folder), "--prompt", TEXT, *OPTIONS, *more]
    assert alone(capsys, *first, "--save", path) == alone(capsys, *first)
    after = alone(capsys, str(folder), "--prompt", "class", "--load", path, *OPTIONS, *more)
    assert after != alone(capsys, str(folder), "--prompt", "class", *OPTIONS)
    second = [str(folder), "--prompt", "class", "--load", path, *OPTIONS, *more]
    assert alone(capsys, *second, "--save", again) == after  # a state behind a state
    assert Path(again).stat().st_size > 0


@pytest.mark.tier2
def test_processes_exchange_states(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by two and read by one, written by one and read by two, and refused in one sentence."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first, second = [str(folder), "--prompt", TEXT, *OPTIONS], [str(folder), "--prompt", "class", *OPTIONS]
    written = alone(capsys, *first, "--save", one)
    done = launched(*first, "--save", two)
    assert done.returncode == 0 and done.stdout == written, done.stderr
    wanted = alone(capsys, *second, "--load", one)
    assert alone(capsys, *second, "--load", two) == wanted
    for path in (one, two):
        done = launched(*second, "--load", path)
        assert done.returncode == 0 and done.stdout == wanted, done.stderr
    next(Path(two).iterdir()).unlink()
    done = launched(*second, "--load", two)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if f"the decode state {two} lacks part-0000" in line
    ]
    assert done.stderr.count("error: the decode state") == 1
