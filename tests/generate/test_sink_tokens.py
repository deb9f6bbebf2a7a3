"""Sink tokens outside of training: every prompt begins with them, no compression takes them, an export keeps them.

Last, the whole path: training over ranks on rows with sinks, then the commands on what was trained.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from corpora import build_small
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from longctx.cache.compress import Compression, Policy
from longctx.cache.options import CacheOptions
from longctx.cache.scorers import KeyNorm
from longctx.cli.main import main
from longctx.config.check import find_problems
from longctx.config.schema import Model
from longctx.data.tokenizer import load_tokenizer
from longctx.errors import ConfigError, DataError
from longctx.eval.scoring import Prompt
from longctx.generate import generate
from longctx.generate.decode import advance, decode_ids
from longctx.generate.speculate import PromptLookup, speculate_ids
from longctx.generate.store import load_decoded, save_decoded
from longctx.model.decoder import CausalLM
from longctx.model.hf import load_hf, save_hf
from longctx.sequence.context import SequenceContext
from longctx.train.setup import resolve_model

SINKS = 3
CONFIG = Model(
    vocab_size=53, sink_tokens=SINKS, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, init_std=0.4,
    intermediate_size=40, max_position_embeddings=128,
)  # fmt: skip


def model() -> CausalLM:
    return CausalLM(CONFIG, seed=1).double().eval()


def logits_after(model: CausalLM, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(torch.tensor([list(ids)]), SequenceContext.single(1, len(ids))).hidden_BTD
        return model.logits(hidden)[0]


def greedy(model: CausalLM, ids: Sequence[int], new: int) -> list[int]:
    """By full forwards."""
    found = list(ids)
    for _ in range(new):
        found.append(int(logits_after(model, found)[-1].argmax()))
    return found[len(ids) :]


def test_every_way_to_decode_begins_with_them(seed: int) -> None:
    made, sinks = model(), [50, 51, 52]
    assert list(CONFIG.sink_ids) == sinks and not CONFIG.model_copy(update={"sink_tokens": 0}).sink_ids
    prompt = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = greedy(made, sinks + prompt, 7)
    assert wanted != greedy(made, prompt, 7)
    assert generate(made, [prompt], 7) == generate(made, [sinks + prompt], 7) == [wanted]
    chunked = [token for (token,) in decode_ids(made, [prompt], 7, chunk=2)]
    speculated = [token for run in speculate_ids(made, prompt, 7, PromptLookup()) for token in run]
    assert chunked == speculated == Prompt(made, prompt).greedy(7, stop=-1) == wanted
    log_probs = logits_after(made, [*sinks, *prompt, *wanted]).log_softmax(-1)
    total = sum(float(log_probs[len(sinks) + len(prompt) - 1 + i, token]) for i, token in enumerate(wanted))
    assert Prompt(made, prompt).log_prob(wanted) == pytest.approx(total, abs=1e-10)
    with pytest.raises(DataError, match="the prompt is empty"):
        next(decode_ids(made, [[]], 1))


def test_no_compression_takes_them(seed: int, tmp_path: Path) -> None:
    made = model()
    policy = Policy(tokens=8, sinks=0, recent=2, every=4)
    options = CacheOptions(block=4, compression=Compression(KeyNorm(), policy))
    tokens = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(seed))
    with_them = torch.cat((torch.tensor([CONFIG.sink_ids]), tokens), dim=1)
    _, done = advance(made, with_them, cache=options)
    save_decoded(done, made, tmp_path / "state")
    again = load_decoded(tmp_path / "state", made, options)
    for start in (done, again):
        run = start
        for token in range(9):
            _, run = advance(made, torch.tensor([[token]]), run)
        for cache in run.state:
            assert cache.options.compression.policy.sinks == SINKS
            for lane in range(2):
                position = cache.lane(lane)[2].tolist()
                assert position[:SINKS] == [0, 1, 2] and len(position) < 8 + 4
    plain = CausalLM(CONFIG.model_copy(update={"sink_tokens": 0}), seed=1).double()
    _, without = advance(plain, with_them, cache=options)
    assert all(cache.options.compression.policy.sinks == 0 for cache in without.state)
    tight = replace(options, compression=Compression(KeyNorm(), replace(policy, tokens=4)))
    with pytest.raises(ConfigError, match="tokens 4 is below the 3 sinks and 2 recent"):
        made.empty_state(1, tight)


def test_an_export_keeps_them(tmp_path: Path) -> None:
    """Embeddings, the number in config.json, and names for their ids; the tokenizer itself stays as it was."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    library.train_from_iterator([Path(__file__).read_text()], trainer)
    (tmp_path / "tok").mkdir()
    library.save(str(tmp_path / "tok" / "tokenizer.json"))
    settings = {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}, "model_max_length": 77}
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path / "tok")
    config = CONFIG.model_copy(update={"vocab_size": ours.vocab_size + SINKS, "eos_token_id": ours.eos_id})
    made = CausalLM(config, seed=1)
    save_hf(made, config, tmp_path / "hf", tmp_path / "tok")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    names = [f"<|sink_{number}|>" for number in range(SINKS)]
    assert theirs.convert_tokens_to_ids(names) == list(config.sink_ids)
    assert theirs("".join(names) + "def f", add_special_tokens=False)["input_ids"] == [
        *config.sink_ids, *ours.encode("def f"),
    ]  # fmt: skip
    assert theirs.model_max_length == 77 and theirs.eos_token_id == ours.eos_id
    loaded, read = load_hf(tmp_path / "hf")
    assert read.sink_ids == config.sink_ids and torch.equal(loaded.embed.weight, made.embed.weight)
    assert load_tokenizer(tmp_path / "hf").fingerprint == ours.fingerprint
    gap = config.model_copy(update={"vocab_size": ours.vocab_size + SINKS + 1})
    with pytest.raises(DataError, match=r"transformers leaves no gaps: train without model\.vocab_size"):
        save_hf(CausalLM(gap), gap, tmp_path / "gap", tmp_path / "tok")
    assert not (tmp_path / "gap").exists()


@pytest.mark.tier2
def test_trained_over_ranks_evaluated_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = build_small(tmp_path / "corpus")
    losses = []
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        sections = {"model": {"sink_tokens": SINKS}, "sequence": {"degree": ranks}, "train": {"eval_every": 2}}
        file = small.write_config(tmp_path / f"{ranks}.yaml", run, **sections)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        words = [sys.executable, *launcher, "-m", "longctx", "train", str(file)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) >= 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    run, words = str(tmp_path / "run1"), load_tokenizer(small.tokenizer).vocab_size
    assert main(["generate", run, "--prompt", "def value", "--max-tokens", "5", "--device", "cpu"]) == 0
    out = str(tmp_path / "eval")
    more = ["--length", "64", "--batches", "3", "--tasks", "perplexity"]
    assert main(["eval", run, "--corpus", str(small.corpus), "--out", out, *more]) == 0
    scores = json.loads((tmp_path / "eval" / "perplexity.json").read_text())
    assert scores["bytes"] > scores["tokens"] / 2 and scores["bits_per_byte"] > 0
    assert main(["export", run, "--out", str(tmp_path / "hf"), "--check"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.convert_tokens_to_ids("<|sink_2|>") == words + 2
    capsys.readouterr()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    """Too few rows of the embedding, no room for text, and beside a folder that says itself how many there are."""
    small = build_small(tmp_path / "corpus")
    tokenizer = load_tokenizer(small.tokenizer)
    words = tokenizer.vocab_size
    fits = small.config(tmp_path / "run", model={"sink_tokens": SINKS})
    assert resolve_model(fits, tokenizer).vocab_size == words + SINKS and not find_problems(fits)
    narrow = small.config(tmp_path / "run", model={"sink_tokens": SINKS, "vocab_size": words + SINKS - 1})
    with pytest.raises(ConfigError, match="of which 3 are sink tokens"):
        resolve_model(narrow, tokenizer)
    (problem,) = find_problems(narrow)
    assert problem.path == ("model", "vocab_size") and "and the 3 of model.sink_tokens" in problem.message
    (problem,) = find_problems(small.config(tmp_path / "run", model={"sink_tokens": 48}))
    assert problem.path == ("model", "sink_tokens") and "leave no room for text" in problem.message
    assert "comes from model.from_hf" in Model(from_hf=tmp_path, sink_tokens=SINKS).idle()["sink_tokens"]
