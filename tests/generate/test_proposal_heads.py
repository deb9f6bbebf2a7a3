"""Blockwise parallel decoding: any heads write the greedy text, trained ones in fewer passes; its commands."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from corpora import SmallCorpus
from pool import Pool
from test_generate_store import MODELS, SIZES
from training import Case, build

from longctx.bench.speculation import Plan, speculation
from longctx.cache.options import CacheOptions
from longctx.checkpoint.folder import open_model
from longctx.cli.main import main
from longctx.config.schema import Model
from longctx.errors import ConfigError, DataError
from longctx.generate.decode import decode_ids
from longctx.generate.sampling import Sampling
from longctx.generate.speculate import Counted, ProposalHeads, speculate_ids
from longctx.generate.text import stream_text
from longctx.model.block_transformer import build_native
from longctx.model.proposals import ProposingDecoder, with_proposals
from longctx.recurrence import with_recurrence
from longctx.runtime.mesh import build_mesh
from longctx.sequence.layout import Run

HEADS = {"heads": 3, "width": 16}
QUICK = ("softmax", "gated_retention", "transformer_vq", "window", "block", "rmt")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.tier2) for name in MODELS]


def model_of(name: str, seed: int, **sizes: Any) -> ProposingDecoder:
    config = Model.model_validate({**SIZES, **MODELS[name], "proposals": HEADS, **sizes})
    model: ProposingDecoder = with_proposals(with_recurrence(build_native(config, seed=seed), seed), seed)
    return model.double()


def plain(model: Any, prompt: Sequence[int], new: int, cache: CacheOptions | None = None) -> list[int]:
    return [row[0] for row in decode_ids(model, [prompt], new, cache=cache or CacheOptions())]


def in_runs(model: Any, prompt: Sequence[int], new: int, cache: CacheOptions | None = None) -> list[list[int]]:
    return list(speculate_ids(model, prompt, new, ProposalHeads(model), cache))


@pytest.mark.parametrize("name", EVERY)
def test_random_heads_write_greedy_text(name: str, seed: int) -> None:
    """For every kind of state; once with heads that repeat the next token, which a text may even do."""
    model, prompt = model_of(name, seed), torch.arange(13).tolist()
    wanted = plain(model, prompt, 24)
    assert wanted == plain(model.decoder, prompt, 24)
    for scale in (1.0, 0.0):
        with torch.no_grad():
            for head in model.proposals:
                head.down_proj.weight.mul_(scale)
        runs = in_runs(model, prompt, 24, CacheOptions(block=4))
        assert [token for run in runs for token in run] == wanted
        assert len(runs[0]) == 1 and 1 <= 23 / (len(runs) - 1) <= 4


def test_rounded_caches_and_ranks_change_nothing(pool: Pool, seed: int) -> None:
    for world in (1, 3):
        for wanted, runs in pool.run(decoded_over_ranks, world, seed):
            assert [token for run in runs for token in run] == wanted
            assert any(len(run) > 1 for run in runs)


def decoded_over_ranks(seed: int) -> tuple[list[int], list[list[int]]]:
    world = torch.distributed.get_world_size()
    group = build_mesh(world, torch.device("cpu"), 60).sequence if world > 1 else None
    cache = CacheOptions(block=4, bits=8, ranks=group)
    model, prompt = model_of("softmax", seed, head_dim=32), list(range(13))
    wanted = plain(model, prompt, 24, cache)
    oracle = Oracle(prompt + wanted)
    return wanted, list(speculate_ids(model, prompt, 24, oracle, cache))


@dataclass
class Oracle:
    """Right, and in every third call wrong at its second token."""

    text: Sequence[int]
    calls: int = 0

    def propose(self, ids: Sequence[int], hidden_D: torch.Tensor) -> list[int]:
        self.calls += 1
        right = list(self.text[len(ids) : len(ids) + 3])
        if self.calls % 3 == 0 and len(right) > 1:
            right[1] = (right[1] + 1) % 61
        return right


@dataclass(frozen=True)
class Cycle:
    """Rows that say the same seven tokens again and again, from another one each time."""

    length: int

    def documents(self, row: int) -> tuple[int, ...]:
        return (0,)

    def read(self, row: int, runs: Sequence[Run]) -> Any:
        at = np.concatenate([np.arange(*run) for run in runs]) if runs else np.empty(0, np.int64)
        tokens = np.array([3, 14, 15, 9, 26, 5, 35])
        return tokens[(row + at) % 7], tokens[(row + at + 1) % 7]


def trained_on_a_cycle(seed: int) -> dict[str, tuple[float, bool]]:
    """Tokens per pass and whether the text is the greedy one, of the trained heads and of fresh ones."""
    case = Case(length=24, batch=4, steps=150, lr=1e-2, clip=1.0, seed=seed % 1000, model={"proposals": HEADS})
    trainer, watch = build(case)
    trainer.rows = Cycle(24)
    trainer.run()
    assert watch.records[-1]["proposal_loss"] < 0.5 * watch.records[0]["proposal_loss"]
    model: Any = trainer.engine.module
    fresh = with_proposals(model.decoder, seed + 1).double()
    prompt, found = [3, 14, 15, 9, 26, 5, 35, 3], {}
    for name, heads in (("trained", model), ("fresh", fresh)):
        runs = in_runs(heads.eval(), prompt, 61)
        found[name] = (60 / (len(runs) - 1), [t for run in runs for t in run] == plain(model, prompt, 61))
    return found


def test_trained_heads_are_accepted_more_than_fresh_ones(pool: Pool, seed: int) -> None:
    """A text that can be foreseen: with three heads up to four tokens per pass, most of them nearly always."""
    (found,) = pool.run(trained_on_a_cycle, 1, seed)
    assert found["trained"][1] and found["fresh"][1]
    assert 2.5 < found["trained"][0] <= 4
    assert found["fresh"][0] < found["trained"][0] - 1


def test_the_count_leaves_out_the_last_pass() -> None:
    model = model_of("softmax", 1)
    counted = Counted(ProposalHeads(model))
    assert counted.mean_accepted is None
    runs = list(speculate_ids(model, [1, 2], 20, counted))
    assert counted.passes == len(runs) - 2
    assert counted.mean_accepted == sum(len(run) for run in runs[1:-1]) / counted.passes


def test_what_cannot_be_exact_is_refused(seed: int) -> None:
    class Words:
        def encode(self, text: str) -> list[int]:
            return [1, 2]

    proposer, words = ProposalHeads(model_of("softmax", seed)), Words()
    with pytest.raises(ConfigError, match=r"not draws at temperature 0.5"):
        next(stream_text(proposer.model, words, "a", 3, Sampling(0.5), proposer=proposer))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="fewer than a prompt of 256"):
        speculation(proposer.model, [1, 2, 3], Plan())


def longctx(words: list[str]) -> int:
    """A command in this process; the world that it joined is forgotten, or the next would wait to be one of it."""
    before = dict(os.environ)
    try:
        return main(words)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.tier2
def test_from_a_run_to_its_heads_to_faster_text(
    small: SmallCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train a decoder, heads on it as it is, generate with both kinds of proposals, measure, export."""
    base = small.write_config(tmp_path / "base.yaml", tmp_path / "base", train={"steps": 6})
    assert longctx(["train", str(base)]) == 0
    values = small.values(tmp_path / "heads", train={"steps": 6})
    values["model"] = {"from_run": str(tmp_path / "base"), "proposals": {"heads": 2, "base": "frozen"}}
    heads = tmp_path / "heads.yaml"
    heads.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert longctx(["check", str(heads)]) == 0
    assert "2 proposal heads (frozen)" in (said := capsys.readouterr().out) and "without its proposal heads" in said
    assert longctx(["train", str(heads)]) == 0
    decoder, _, _ = open_model(tmp_path / "base")
    model, config, _ = open_model(tmp_path / "heads")
    assert isinstance(model, ProposingDecoder) and config.from_run is None
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(tensor, decoder.state_dict()[name]), name
    logged = [json.loads(line) for line in (tmp_path / "heads" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["proposal_loss"] > 0 for record in logged if record["kind"] == "train")

    prompt = ["--prompt", "def class return self", "--max-tokens", "30", "--device", "cpu"]
    texts = []
    for words in ([], ["--speculate", "heads"], ["--speculate", "lookup"]):
        capsys.readouterr()
        assert longctx(["generate", str(tmp_path / "heads"), *prompt, *words]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert ("tokens per pass" in err) == bool(words)
    assert texts[0] == texts[1] == texts[2]
    assert longctx(["generate", str(tmp_path / "base"), *prompt, "--speculate", "heads"]) == 2
    assert "has no proposal heads" in capsys.readouterr().err

    file, text = tmp_path / "speed.json", next(iter((small.corpus.parent / "texts").glob("39.txt")))
    sizes = ["--prompts", "2", "--prompt-tokens", "40", "--tokens", "12", "--rounds", "1", "--json", str(file)]
    assert longctx(["bench", "speculation", str(tmp_path / "heads"), "--file", str(text), *sizes]) == 0
    rows = {row["method"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {"plain", "lookup", "heads"} and rows["plain"]["speedup"] == rows["plain"]["accepted"] == 1
    assert all(row["same"] == 2 and row["tokens_per_second"] > 0 for row in rows.values())
    assert 1 <= rows["heads"]["accepted"] <= 3
    capsys.readouterr()

    assert longctx(["export", str(tmp_path / "heads"), "--out", str(tmp_path / "hf"), "--check"]) == 0
    assert "leaving out 2 proposal heads" in capsys.readouterr().out
