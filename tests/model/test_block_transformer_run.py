"""A Block Transformer as a user has it: checked, trained, resumed, evaluated, generated from, and not exported."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from corpora import SmallCorpus

from longctx.checkpoint.folder import open_model
from longctx.cli.main import main
from longctx.errors import ConfigError
from longctx.generate import generate
from longctx.model.block_transformer import BlockTransformer
from longctx.model.hf import save_hf
from longctx.sequence.context import SequenceContext

BLOCK = {"block": {"size": 4, "layers": 1}, "tie_embeddings": True}


def longctx(*args: object) -> int:
    """Exit status of a command, which leaves the environment as it was: it may join a world."""
    before = dict(os.environ)
    try:
        return main([str(arg) for arg in args])
    finally:
        os.environ.clear()
        os.environ.update(before)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_it_goes_through_every_command(small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    file = small.write_config(tmp_path / "c.yaml", run, model=BLOCK)
    assert longctx("check", file) == 0
    said = capsys.readouterr().out
    assert "llama, 2 layers over blocks of 4 and 1 inside, width 16" in said
    assert "not possible: only plain decoders export" in said
    assert longctx("train", file) == 0
    whole = losses(run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert longctx("train", file) == 0
    assert losses(run) == [*whole, *whole[2:]]  # steps 3 and 4 again, bit for bit

    model, config, tokenizer = open_model(run)
    assert isinstance(model, BlockTransformer) and config.block is not None and model.head.weight is model.embed.weight
    prompt = tokenizer.encode("def class return")
    capsys.readouterr()
    assert longctx("generate", run, "--prompt", "def class return", "--max-tokens", 9, "--device", "cpu") == 0
    ids = generate(model, [prompt], 9, eos_id=tokenizer.eos_id)[0]
    assert "def class return" + capsys.readouterr().out[:-1] == tokenizer.decode(prompt + ids)
    with torch.no_grad():
        hidden = model(torch.tensor([prompt]), SequenceContext.single(1, len(prompt))).hidden_BTD
        assert int(model.logits(hidden)[0, -1].argmax()) == ids[0]

    assert longctx("eval", run, "--tasks", "perplexity", "--batches", 2) == 0
    result = json.loads((run / "eval" / "perplexity.json").read_text())
    assert 0 < result["loss"] < 10
    capsys.readouterr()

    assert longctx("export", run, "--out", tmp_path / "hf") == 2
    assert "is a Block Transformer (model.block), which no Hugging Face folder holds" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    with pytest.raises(ConfigError, match=r"a Block Transformer \(model.block\) has no place in a llama folder"):
        save_hf(model, config, tmp_path / "hf")
