"""`longctx eval` end to end on a small real model, and its answers to bad input."""

import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_helpers import Built

from longctx.cli.main import main
from longctx.data.corpus import open_corpus
from longctx.data.tokenizer import load_tokenizer
from longctx.data.train_tokenizer import train_sentencepiece
from longctx.model.decoder import CausalLM
from longctx.model.hf import load_hf
from longctx.sequence.context import SequenceContext

OPTIONS = ["--length", "300", "--lengths", "350", "--batches", "5", "--samples", "1"]


def evaluate(built: Built, out: Path, *more: str) -> dict[str, Any]:
    """Run the command in this process and return results by task."""
    assert main(["eval", str(built.model), "--corpus", str(built.corpus), "--out", str(out), *OPTIONS, *more]) == 0
    return {path.stem: json.loads(path.read_text()) for path in out.iterdir()}


def naive_loss(model: CausalLM, built: Built, length: int, rows: int) -> tuple[float, int]:
    """Held-out loss by plain forwards over document pieces, one at a time."""
    corpus = open_corpus(built.corpus, "valid")
    total, count = 0.0, 0
    tokens = torch.from_numpy(corpus.tokens(0, corpus.num_tokens))
    cuts = sorted({*corpus.offsets.tolist(), *range(0, rows * length + 1, length)})
    for start, stop in pairwise(cuts):
        if stop > rows * length:
            break
        # The label of a piece's last token is the document's next one, if the document goes on.
        ends = stop in corpus.offsets
        labels = tokens[start + 1 : stop] if ends else tokens[start + 1 : stop + 1]
        output = model(tokens[None, start:stop], SequenceContext.single(1, stop - start))
        log_probs = model.logits(output.hidden_BTD)[0].double().log_softmax(-1)[: len(labels)]
        total -= float(log_probs.gather(1, labels[:, None]).sum())
        count += len(labels)
    return total / count, count


@torch.no_grad()
def test_numbers_are_those_of_plain_forwards(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate(built, tmp_path / "out")
    model, _ = load_hf(built.model)
    scores = results["perplexity"]
    loss, count = naive_loss(model, built, 300, scores["rows"])
    assert scores["rows"] == 5
    assert scores["tokens"] == count == sum(entry["count"] for entry in scores["bins"])
    assert scores["loss"] == pytest.approx(loss, abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]), rel=1e-12)
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] * count / math.log(2) / scores["bytes"], rel=1e-12)
    assert scores["gain"]["curve"][-1]["context"] == 300 + 1 - 75
    unigram = results["unigram"]
    assert unigram["train_tokens"] == open_corpus(built.corpus, "train").num_tokens
    needle = results["needle"]
    assert needle["chance"] == 0.1
    assert [cell["length"] for cell in needle["cells"]] == [350] * 5
    printed = capsys.readouterr().out
    assert f"{scores['loss']:.4f}" in printed
    assert f"{unigram['entropy']:.4f}" in printed
    assert "chance 10.0%" in printed
    for task in results:
        assert str(tmp_path / "out" / f"{task}.json") in printed


def test_bytes_are_those_of_the_text(built: Built, tmp_path: Path) -> None:
    scores = evaluate(built, tmp_path, "--tasks", "perplexity")["perplexity"]
    corpus, tokenizer = open_corpus(built.corpus, "valid"), load_tokenizer(built.tokenizer)
    ends = set(corpus.offsets.tolist())
    cuts = sorted({*(end for end in ends if end < 1500), *range(0, 1501, 300)})
    expected = 0
    for start, stop in pairwise(cuts):
        targets = corpus.tokens(start + 1, stop if stop in ends else stop + 1)
        expected += len(tokenizer.decode(targets.tolist()).encode())
    assert scores["bytes"] == expected


def test_same_seed_same_results(built: Built, tmp_path: Path) -> None:
    first = evaluate(built, tmp_path / "a", "--seed", "3")
    assert first == evaluate(built, tmp_path / "b", "--seed", "3")
    assert first["perplexity"]["gain"] != evaluate(built, tmp_path / "c", "--seed", "4")["perplexity"]["gain"]


def test_only_the_asked_tasks_run(built: Built, tmp_path: Path) -> None:
    assert set(evaluate(built, tmp_path, "--tasks", "unigram")) == {"unigram"}


def torchrun(world: int, *words: str) -> "subprocess.CompletedProcess[str]":
    """`longctx eval` on ``world`` ranks."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone"]
    command = [sys.executable, *launcher, "-m", "longctx", "eval", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.tier2
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_with_one_process(built: Built, tmp_path: Path, world: int) -> None:
    single = evaluate(built, tmp_path / "single")
    done = torchrun(world, str(built.model), "--corpus", str(built.corpus), "--out", str(tmp_path / "many"), *OPTIONS)
    assert done.returncode == 0, done.stderr
    many = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "many").iterdir()}
    assert many["needle"]["world"] == world
    assert many["needle"]["cells"] == single["needle"]["cells"]
    assert many["unigram"]["entropy"] == single["unigram"]["entropy"]
    assert many["perplexity"]["bytes"] == single["perplexity"]["bytes"]
    for ours, theirs in zip(many["perplexity"]["bins"], single["perplexity"]["bins"], strict=True):
        assert ours["count"] == theirs["count"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    for ours, theirs in zip(many["perplexity"]["gain"]["curve"], single["perplexity"]["gain"]["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 2 and one line that holds ``sentence``."""
    capsys.readouterr()
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert sentence in printed
    assert printed.count("\n") == 1


def test_bad_input_is_refused_in_one_sentence(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, corpus = str(built.model), ["--corpus", str(built.corpus)]
    out = tmp_path / "out"
    more = [*corpus, "--out", str(out)]
    refused(["eval", str(tmp_path / "none")], "no model at", capsys)
    refused(["eval", model, "--out", str(out)], "give one with --corpus", capsys)
    refused(["eval", model, "--corpus", str(tmp_path)], str(tmp_path), capsys)
    refused(["eval", model, *more, "--tasks", "perplexity,nedle"], "unknown task nedle; choose from", capsys)
    refused(["eval", model, *more, "--tasks", ""], "unknown task", capsys)
    refused(["eval", model, *more, "--length", "4 bananas"], "--length: '4 bananas' is not a whole number", capsys)
    refused(["eval", model, *more, "--batches", "0"], "--batches must be at least 1, not 0", capsys)
    refused(["eval", model, *more, "--lengths", "512,,"], "--lengths: '' is not a whole number", capsys)
    refused(["eval", str(tmp_path), *more], "no run folder, checkpoint or Hugging Face folder", capsys)
    assert not out.exists()


def test_length_beyond_the_text_or_below_the_needle(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["eval", str(built.model), "--corpus", str(built.corpus), "--out", str(tmp_path)]
    refused([*base, "--tasks", "perplexity", "--length", "1M"], "fewer than one sequence", capsys)
    refused([*base, "--tasks", "needle", "--lengths", "64"], "needs at least", capsys)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_of_another_corpus(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_sentencepiece(["def other text " * 200], tmp_path / "tokenizer", 280)
    shutil.copytree(built.model, tmp_path / "model")
    shutil.copy(tmp_path / "tokenizer" / "tokenizer.model", tmp_path / "model" / "tokenizer.model")
    argv = ["eval", str(tmp_path / "model"), "--corpus", str(built.corpus), "--out", str(tmp_path / "out")]
    refused(argv, "is not the one corpus", capsys)
    assert not (tmp_path / "out").exists()


def test_unwritable_out(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    argv = ["eval", str(built.model), "--corpus", str(built.corpus), "--out", str(tmp_path / "file")]
    refused(argv, "cannot write results to", capsys)


@pytest.mark.tier2
@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--out", "FILE"], "cannot write results to"),
        (["--out", "NEW", "--length", "1M"], "fewer than one sequence"),
        (["--out", "NEW", "--length", "many"], "--length: 'many' is not a whole number"),
    ],
)
def test_one_rank_speaks(built: Built, tmp_path: Path, options: list[str], sentence: str) -> None:
    """Bug: of several ranks the first gave the reason, and the others repeated it or blamed the network. Fix: ranks
    agree after every step that can be refused, and all but one give way. Strategy: two ranks and bad input, before
    the world is joined, on the first rank alone, and on both."""
    (tmp_path / "FILE").touch()
    words = [str(tmp_path / word) if word in ("FILE", "NEW") else word for word in options]
    done = torchrun(2, str(built.model), "--corpus", str(built.corpus), *words)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert sentence in said[0]


def test_export_inside_a_run_takes_corpus_and_length_from_the_run(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(built.model, run / "export")
    (run / "config.yaml").write_text(
        f"run: {run}\ndata: {{sources: [{{path: {built.corpus}}}]}}\nsequence: {{length: 256}}\ntrain: {{steps: 1}}\n"
    )
    assert main(["eval", str(run / "export"), "--tasks", "perplexity", "--batches", "2"]) == 0
    result = json.loads((run / "eval" / "perplexity.json").read_text())
    assert (result["length"], result["rows"], result["corpus"]) == (256, 2, str(built.corpus))
