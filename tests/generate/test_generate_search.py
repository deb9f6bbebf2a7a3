"""``longctx cache calibrate`` and what ``longctx generate`` does with its file or an index; attached models, too."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import SmallCorpus
from tiny_families import tiny_model

from longctx.cache.loki import Loki
from longctx.cache.options import CacheOptions
from longctx.cli.main import main
from longctx.config.schema import Model
from longctx.data.tokenizer import load_tokenizer
from longctx.generate.calibrate import key_bases
from longctx.generate.decode import advance
from longctx.model.attached import AttachedCausalLM
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf

HAS_FAISS = importlib.util.find_spec("faiss") is not None
PROMPT = "the little model reads a long text again and again " * 6


@pytest.fixture(scope="module")
def folder(small: SmallCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, key bases beside it, a text."""
    root = tmp_path_factory.mktemp("searched")
    config = Model(
        vocab_size=load_tokenizer(small.tokenizer).vocab_size, hidden_size=24, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, intermediate_size=40, max_position_embeddings=512, init_std=0.4,
    )  # fmt: skip
    save_hf(CausalLM(config, seed=1), config, root / "hf", small.tokenizer)
    (root / "text.txt").write_text("some text to look at, with words of many kinds, 1 2 3 " * 40)
    return root


def longctx(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_calibrate_and_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bases = folder / "bases.safetensors"
    options = ("--text", folder / "text.txt", "--out", bases, "--tokens", 300, "--length", 128)
    assert longctx("cache", "calibrate", folder / "hf", *options) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "300 tokens in sequences of 128"
    assert said[1].startswith("layer 0: 90% of the variance in ") and said[1].endswith(" of 8 coordinates")
    assert said[3:] == [f"wrote {bases}"]
    found = {}
    for extra in ((), ("--loki-ratio", 1), ("--loki-rank", 2, "--loki-ratio", 0.05), ("--loki-recent", 4000)):
        loki = ("--loki", bases, *extra) if extra else ()
        fixed = ("--max-tokens", 24, "--device", "cpu", "--temperature", 1.0)
        assert longctx("generate", folder / "hf", "--prompt", PROMPT, *fixed, *loki) == 0
        found[extra] = capsys.readouterr().out
    assert found["--loki-ratio", 1] == found["--loki-recent", 4000] == found[()]
    assert found["--loki-rank", 2, "--loki-ratio", 0.05] != found[()]
    if HAS_FAISS:
        assert longctx("generate", folder / "hf", "--prompt", PROMPT, *fixed, "--neighbours", 500) == 0
        assert capsys.readouterr().out == found[()]


@pytest.mark.tier2
def test_ranks_write_what_one_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bases = folder / "two.safetensors"
    assert longctx("cache", "calibrate", folder / "hf", "--text", folder / "text.txt", "--out", bases) == 0
    words = ["generate", folder / "hf", "--prompt", PROMPT, "--max-tokens", 16, "--device", "cpu", "--loki", bases]
    capsys.readouterr()
    assert longctx(*words) == 0
    alone = capsys.readouterr().out
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longctx"]
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone


@pytest.mark.parametrize(
    "args, message",
    [
        (("--loki-rank", 4), "--loki-rank has no effect without --loki"),
        (("--loki", "FILE", "--neighbours", 3), "--loki and --neighbours both choose"),
        (("--loki", "FILE", "--keep", 0.5), "leave search or compression out"),
        (("--loki", "FILE", "--loki-ratio", 2), "ratio 2.0 is out of range"),
        (("--loki", "FILE", "--loki-recent", 0), "--loki-recent must be at least 1"),
        (("--loki", "nowhere"), "there is no file nowhere of key bases"),
        (("--loki", "FILE"), "cannot read the key bases"),
        (("--neighbours", 0), "--neighbours must be at least 1"),
        (("--neighbours", 3, "--device", "cuda"), "use --device cpu"),
    ],
)
def test_generate_refuses(
    args: tuple[object, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder / "text.txt" if word == "FILE" else word for word in args]
    assert longctx("generate", folder / "hf", "--prompt", "a", "--max-tokens", 2, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_missing_library_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert longctx("generate", folder / "hf", "--prompt", "a", "--neighbours", 3) == 2
    assert 'install it with pip install "longctx[neighbours]"' in capsys.readouterr().err


def test_calibrate_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken").write_bytes(b"\xff")
    text, out = folder / "text.txt", tmp_path / "out"
    for words, message in (
        (("--text", "nowhere", "--out", out), "cannot read the text nowhere"),
        (("--text", tmp_path / "broken", "--out", out), "is not UTF-8 (byte 0)"),
        (("--text", text, "--out", tmp_path), "cannot be written"),
        (("--text", text, "--out", out, "--tokens", 1), "--tokens must be at least 2"),
    ):
        assert longctx("cache", "calibrate", folder / "hf", *words) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma3_text"])
@torch.no_grad()
def test_attached_models_are_searched(family: str, seed: int) -> None:
    """With bases of their own keys, sinks and windows held: all tokens are exact, few are something else."""
    model: Any = AttachedCausalLM(tiny_model(family), Model(hf_config={}, vocab_size=97)).eval()
    ids = torch.randint(3, 60, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    bases = {layer: basis for layer, (basis, _) in key_bases(model, ids, 30).items()}
    found = []
    for search in (None, Loki(bases, rank=2, ratio=1.0), Loki(bases, rank=2, tokens=2)):
        _, done = advance(model, torch.tensor([ids[:40]]), cache=CacheOptions(block=4, search=search))
        steps = []
        for token in ids[40:46]:
            hidden, done = advance(model, torch.tensor([[token]]), done)
            steps.append(hidden)
        found.append(torch.cat(steps, dim=1))
    tolerance = 1e-9 if found[0].dtype == torch.float64 else 2e-4
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    assert (found[2] - found[0]).abs().max() > 1e-3
