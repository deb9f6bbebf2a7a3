"""``longctx bench training``: all variants see the same tokens; what it prints is what was measured."""

import json
import math
from pathlib import Path

import pytest
import torch
from corpora import SmallCorpus

from longctx.bench.training import STATE_TOKENS, VARIANTS, model_state_size
from longctx.cli.main import main
from longctx.config.mixers import MIXER_NAMES
from longctx.config.schema import Model
from longctx.model.block_transformer import build_native
from longctx.model.decoder import CausalLM
from longctx.recurrence import with_recurrence
from longctx.sequence.context import SequenceContext


def test_variants_are_trained_for_equally_many_tokens(
    small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = small.write_config(tmp_path / "run.yaml", tmp_path / "never"), tmp_path / "found.json"
    options = ["--kinds", "conv,softmax,rmt", "--json", str(file), "train.eval_batches=1"]
    assert main(["bench", "training", str(config), *options]) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert list(rows) == ["conv", "softmax", "rmt"]
    assert {row["tokens"] for row in rows.values()} == {4 * 2 * 48}
    assert all(math.isfinite(row["loss"]) and row["tokens_per_second"] > 0 for row in rows.values())
    per_token = 4 * 2 * (2 * 16)  # bytes x layers x (keys and values)
    assert rows["softmax"]["state_bytes"] == [n * per_token for n in STATE_TOKENS]
    assert rows["conv"]["state_bytes"][0] == rows["conv"]["state_bytes"][1]
    assert rows["rmt"]["state_bytes"] == [(512 + 2 * 16) * per_token + 4 * 16 * 16] * 2
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("|")[2]) for line in lines if line.startswith(("| conv", "| softmax", "| rmt"))]
    assert len(losses) == 3 and losses == sorted(losses)
    assert not (tmp_path / "never").exists()


def test_every_mixer_is_a_variant() -> None:
    assert set(MIXER_NAMES) | {"rmt", "armt"} <= set(VARIANTS)


@pytest.mark.parametrize("kind", ["rmt", "armt"])
def test_state_size_of_a_recurrence_is_what_decoding_keeps(kind: str) -> None:
    """In the last token before a segment ends, when the rows of the memory behind are still to come."""
    recurrence = {"kind": kind, "segment": 8, "memory": 3}
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    model = with_recurrence(CausalLM(Model.model_validate({"vocab_size": 11, **sizes, "recurrence": recurrence})))
    tokens, state = torch.zeros(1, 23, dtype=torch.int64), model.empty_state(1)
    state = model(tokens, SequenceContext.single(1, 0).extend(23), state=state).state
    numbers = sum(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(state))
    planned = model_state_size(model.config)
    assert planned.per_token == 0
    assert numbers + (3 + 1) * 2 * (2 * 3 * 4) == planned.per_sequence


def test_state_size_of_a_block_transformer_is_what_decoding_keeps() -> None:
    """After 23 tokens: five blocks of four, and a block with three tokens and its prefix."""
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    config = Model.model_validate({"vocab_size": 11, **sizes, "block": {"size": 4, "layers": 1, "prefix": 2}})
    model, tokens = build_native(config), torch.zeros(1, 23, dtype=torch.int64)
    state = model(tokens, SequenceContext.single(1, 0).extend(23), state=model.empty_state(1)).state
    leaves = torch.utils._pytree.tree_leaves(state)
    planned = model_state_size(config)
    assert sum(t.numel() for t in leaves if t.is_floating_point()) == 20 * planned.per_token + planned.per_sequence


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--kinds", "lstm"], "--kinds lstm is unknown; choose from softmax"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json cannot be written"),
        (["train.lr=fast"], "train.lr"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small.write_config(tmp_path / "run.yaml", tmp_path / "never")
    assert main(["bench", "training", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
