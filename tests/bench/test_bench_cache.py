"""``longctx bench retrieval`` and ``cache``: rows with one right answer, a model that learns, files on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from longctx.bench import cache as bench
from longctx.bench.retrieval import ASK, ENTRY, KEY, KEYS, NOISE, VALUE, VALUES, VOCAB, Entries, stages
from longctx.cache.options import CacheOptions
from longctx.cli.main import main
from longctx.model.head import IGNORED
from longctx.sequence.layout import Run

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "retrieval.yaml")


@pytest.mark.parametrize("entries", [(1, 1), (3, 8)])
def test_rows_have_one_right_answer(entries: tuple[int, int], seed: int) -> None:
    source = Entries(96, 6, entries, seed)
    for number in range(20):
        tokens, labels = source.row(number)
        inside, behind = tokens[: source.context], tokens[source.context :].reshape(-1, 3)
        held = inside[inside >= NOISE] - ENTRY
        values = dict(zip((held // VALUES).tolist(), (held % VALUES).tolist(), strict=True))
        assert entries[0] <= len(values) == len(held) <= entries[1]
        assert (behind[:, 0] == ASK).all() and tokens.max() < VOCAB
        for _, key, value in behind.tolist():
            assert values[key - KEY] == value - VALUE
        asked = np.flatnonzero(labels != IGNORED)
        assert (asked == source.context + 3 * np.arange(6) + 1).all()
        assert (labels[asked] == tokens[asked + 1]).all()


def test_rows_are_read_in_runs_and_grow(seed: int) -> None:
    source = Entries(64, 4, (1, 4), seed)
    tokens, labels = source.row(3)
    read = source.read(3, [Run(40, 64), Run(0, 7)])
    index = [*range(40, 64), *range(7)]
    assert (read[0] == tokens[index]).all() and (read[1] == labels[index]).all()
    grown = stages(256)
    assert [rows.length for rows in grown] == [32, 64, 128, 256]
    assert all(1 <= rows.entries[1] < KEYS and rows.context > 0 for rows in grown)


def test_questions_are_not_rows_of_training_and_shares_are_whole() -> None:
    asked = bench.questions("multi-key", 256, 4, 1)
    length = len(asked["contexts"][0])
    assert all(float(share * length).is_integer() for share in bench.SHARES)
    assert [len(q) for q in asked["questions"]] == [2] * 4
    for context, (_, key), answer in zip(asked["contexts"], asked["questions"], asked["answers"], strict=True):
        assert ENTRY + (key - KEY) * VALUES + answer - VALUE in context


def test_train_measure_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of few steps, all methods; at share 1 every one is no compression; kvpress's results stand beside."""
    model = tmp_path / "model"
    small = ["train.steps=3", "train.batch=4", "train.micro_batch=4", "sequence.length=64", "runtime.threads=1"]
    assert main(["bench", "retrieval", CONFIG, "--out", str(model), *small]) == 1  # not learned, and says so
    assert "raise train.steps" in capsys.readouterr().out
    reference = tmp_path / "kvpress.json"
    reference.write_text(json.dumps([{"task": "needle", "method": "tova", "share": 0.5, "accuracy": 0.25}]))
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("json", "json"), ("plot", "png"), ("questions", "q"))}
    options = [str(part) for name, file in files.items() for part in (f"--{name}", file)]
    words = ["bench", "cache", str(model), "--length", "64", "--rows", "16", "--compare", str(reference), *options]
    assert main(words) == 0
    assert "(25)" in capsys.readouterr().out
    found = json.loads(files["json"].read_text())
    asked = json.loads(files["questions"].read_text())["tasks"]
    assert len(found) == len(bench.TASKS) * len(bench.available()) * len(bench.SHARES)
    assert files["plot"].read_bytes()[:4] == b"\x89PNG"
    from longctx.model.hf import load_hf

    loaded = load_hf(model)[0].eval()
    for task in bench.TASKS:
        plain = bench.accuracy(loaded, asked[task], CacheOptions(block=16))
        assert {row["accuracy"] for row in found if (row["task"], row["share"]) == (task, 1.0)} == {plain}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "retrieval", CONFIG, "--out", "x", "model.vocab_size=99"], "the task has 321 tokens"),
        (["bench", "retrieval", CONFIG, "--out", "x", "engine.kind=deepspeed"], "set engine.kind to torch"),
        (["bench", "retrieval", CONFIG, "--out", "x", "model.block={size: 4}"], "model.block has no place in"),
        (["bench", "retrieval", CONFIG, "--out", "x", "model.sink_tokens=4"], "model.sink_tokens has no place in"),
        (["bench", "cache", "nowhere"], "nowhere"),
        (["bench", "cache", "nowhere", "--compare", "gone.json"], "tools/kvpress_reference.py"),
        (["bench", "cache", "nowhere", "--json", "no/such/file"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
