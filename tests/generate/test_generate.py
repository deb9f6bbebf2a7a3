"""Decoding against the full forward and transformers' generate; sampling, stop strings, streaming."""

import argparse
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from longctx.cli import generate_cmd
from longctx.config.schema import Model, Rope
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.data.train_tokenizer import train_sentencepiece
from longctx.errors import ConfigError, DataError
from longctx.generate import Sampling, decode_ids, generate, stream_text
from longctx.generate import text as text_module
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf
from longctx.sequence.context import SequenceContext

VOCAB = 53
CONFIG = Model(
    vocab_size=VOCAB, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40,
    max_position_embeddings=16, init_std=0.4, family="qwen3", qk_norm=True, sliding_window=6,
    window_layers=(False, True),
)  # fmt: skip
LONGROPE = Rope(rope_type="longrope", factor=2.0, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 3.0, 4.0))
ROPES = {"default": Rope(), "dynamic": Rope(rope_type="dynamic", factor=3.0), "longrope": LONGROPE}


def _model(rope: Rope | None = None) -> CausalLM:
    return CausalLM(CONFIG.model_copy(update={"rope": rope or Rope()}), seed=1).double().eval()


def _prompts(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _greedy_by_full_forwards(model: CausalLM, prompt: Sequence[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), SequenceContext.single(1, len(ids))).hidden_BTD
        ids.append(int(model.logits(hidden)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("rope", ROPES)
def test_greedy_equals_full_forwards(rope: str) -> None:
    """13 new tokens after 9 cross max_position_embeddings = 16, where dynamic and longrope change their tables."""
    model, prompts = _model(ROPES[rope]), _prompts(2, 9, 5, 9)
    assert generate(model, prompts, 13) == [_greedy_by_full_forwards(model, prompt, 13) for prompt in prompts]


@pytest.mark.parametrize("rope", ["default", "longrope"])
def test_every_step_uses_the_state_unless_the_rotation_changes(rope: str) -> None:
    model, lengths = _model(ROPES[rope]), []
    model.embed.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    list(decode_ids(model, _prompts(3, 14), 5))
    assert lengths == [14, 1, 1, 17 if rope == "longrope" else 1, 1]


def test_greedy_equals_transformers(tmp_path: Path) -> None:
    model = CausalLM(CONFIG, seed=1)
    save_hf(model, CONFIG, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager")
    prompts = _prompts(4, 11, 11)
    expected = theirs.generate(torch.tensor(prompts), max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 11:]
    assert generate(model, prompts, 20) == expected.tolist()
    assert len(set(expected.flatten().tolist())) > 5  # a constant would agree too easily


def test_an_end_token_ends_only_its_own_prompt() -> None:
    model, prompts = _model(), _prompts(5, 7, 7)
    free = generate(model, prompts, 12)
    end = free[0][3]
    first = [row[: row.index(end)] if end in row else row for row in free]
    assert generate(model, prompts, 12, eos_id=end) == first
    assert len(first[0]) <= 3


def test_samples_do_not_depend_on_the_batch() -> None:
    model, prompts = _model(), _prompts(6, 7, 4, 7)
    sampling = Sampling(temperature=1.5, seed=3)
    together = generate(model, prompts, 10, sampling)
    assert together == generate(model, prompts, 10, sampling)
    assert together != generate(model, prompts, 10, Sampling(temperature=1.5, seed=4))
    alone = list(decode_ids(model, [prompts[2]], 10, sampling, streams=[2]))
    assert [row[0] for row in alone] == together[2]
    same = generate(model, [prompts[0], prompts[0]], 10, sampling)
    assert same[0] != same[1]


def test_probabilities() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    tempered = Sampling(temperature=2.0).probabilities(logits)
    torch.testing.assert_close(tempered, (logits.double() / 2).softmax(-1), rtol=0, atol=1e-15)
    p = logits.double().softmax(-1)  # 0.09, 0.66, 0.24, 0.01
    for top_p, kept in ((0.5, [1]), (0.7, [1, 2]), (0.905, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        found = Sampling(temperature=1.0, top_p=top_p).probabilities(logits)
        assert found.nonzero().flatten().tolist() == kept
        torch.testing.assert_close(found[kept], p[kept] / p[kept].sum(), rtol=0, atol=1e-15)


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    generator, logits = sampling.generator(0), torch.tensor([0.0, 1.0, -float("inf")])
    counts = Counter(sampling.choose(logits, generator) for _ in range(4000))
    assert counts[2] == 0
    # Five standard deviations of a binomial draw.
    assert counts[1] / 4000 == pytest.approx(1 / (1 + torch.e**-1), abs=5 * (0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        Sampling(**bad)  # type: ignore[arg-type]


def test_empty_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="the prompt is empty"):
        generate(_model(), [[]], 3)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix-space", "plain"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece tokenizer, with and without a space put before every text."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = Path(text_module.__file__).read_text().splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=request.param, minloglevel=2,
    )  # fmt: skip
    return load_tokenizer(folder)


def _script(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Let the model "generate" these ids."""

    def scripted(model: Any, prompts: Any, max_tokens: int, sampling: Any, **_: Any) -> Iterator[list[int]]:
        yield from ([token] for token in ids[:max_tokens])

    monkeypatch.setattr(text_module, "decode_ids", scripted)


NO_MODEL: Any = None


@pytest.mark.parametrize(
    "text", ["plain words  with   spaces\n\n  and lines", "naïve 中文 🙂🙂 end", "🙂", "def f(self): return 0"]
)
def test_pieces_join_to_the_text(text: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, new = tokenizer.encode("The prompt é"), tokenizer.encode("x" + text)
    whole = tokenizer.decode(prompt + new)
    _script(monkeypatch, new)
    pieces = list(stream_text(NO_MODEL, tokenizer, "The prompt é", 1000))
    assert "The prompt é" + "".join(pieces) == whole
    assert text in whole
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_are_shown_at_the_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    smile = tokenizer.encode("🙂")[-4:]
    _script(monkeypatch, smile[:2])
    assert "\ufffd" in "".join(stream_text(NO_MODEL, tokenizer, "p", 10))


@pytest.mark.parametrize(
    "stop, shown",
    [
        (["CCC"], "aaa bbb ccc ddd"),
        (["ccc"], "aaa bbb "),
        (["ddd", "bbb"], "aaa "),
        (["b c"], "aaa bb"),
        (["a"], ""),
        (["dddd", " ddd!"], "aaa bbb ccc ddd"),
    ],
)
def test_stop_strings(stop: list[str], shown: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tokenizer.encode("|aaa bbb ccc ddd")
    new = new[next(i for i, token in enumerate(new) if "|" in tokenizer.decode([token])) + 1 :]
    _script(monkeypatch, new)
    assert "".join(stream_text(NO_MODEL, tokenizer, "|", 1000, stop=stop)) == shown


def test_the_end_token_and_the_limit_end_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tokenizer.encode("yes no")
    _script(monkeypatch, [*new, tokenizer.eos_id, *new])
    assert "".join(stream_text(NO_MODEL, tokenizer, "p", 1000)).strip() == "yes no"
    one = "".join(stream_text(NO_MODEL, tokenizer, "p", 1))
    assert tokenizer.decode([*tokenizer.encode("p"), new[0]]) == "p" + one


def test_streaming_runs_the_model(tokenizer: Tokenizer) -> None:
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = CausalLM(config, seed=1).double()
    ids = generate(model, [tokenizer.encode("def ")], 9, eos_id=tokenizer.eos_id)[0]
    text = "".join(stream_text(model, tokenizer, "def ", 9))
    assert "def " + text == tokenizer.decode(tokenizer.encode("def ") + ids)


def test_empty_stop_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="stop string is empty"):
        next(stream_text(NO_MODEL, tokenizer, "p", 3, stop=[""]))
    with pytest.raises(DataError, match="prompt is empty"):
        next(stream_text(NO_MODEL, tokenizer, "", 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer."""
    root = tmp_path_factory.mktemp("model")
    text = Path(text_module.__file__).read_text()
    vocab = train_sentencepiece([text[i : i + 500] for i in range(0, len(text), 500)], root / "tok", 420)
    config = CONFIG.model_copy(update={"vocab_size": vocab.tokenizer.vocab_size, "eos_token_id": 2})
    save_hf(CausalLM(config, seed=1), config, root / "hf", root / "tok")
    return root / "hf"


def _longctx(*args: object) -> int:
    from longctx.cli.main import main

    return main([str(arg) for arg in args])


def test_generate_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max-tokens", 12, "--device", "cpu")
    assert _longctx("generate", folder, "--prompt", "def f", *options) == 0
    text = capsys.readouterr().out
    assert text.strip()
    (tmp_path / "prompt.txt").write_text("def f")
    assert _longctx("generate", folder, "--file", tmp_path / "prompt.txt", *options) == 0
    assert capsys.readouterr().out == text
    assert _longctx("generate", folder, "--prompt", "def f", *options, "--temperature", 1.2, "--top-p", 0.9) == 0
    assert capsys.readouterr().out != text


def test_generate_command_reads_stdin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, texts = ("--max-tokens", 12, "--device", "cpu"), []
    for prompt in (b"def f", "d\u00e9f".encode()):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt)))
        assert _longctx("generate", folder, *options) == 0
        texts.append(capsys.readouterr().out)
        assert _longctx("generate", folder, "--prompt", prompt.decode(), *options) == 0
        assert capsys.readouterr().out == texts[-1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def \xff")))
    assert _longctx("generate", folder, *options) == 2
    assert capsys.readouterr().err == "error: the text stdin is not UTF-8 (byte 4); convert it first\n"
    assert texts[0] != texts[1]


@pytest.mark.parametrize("more", [(), ("--stop", "e"), ("--keep", 40), ("--cache-bits", 8)], ids=str)
def test_several_prompts_are_written_apart(
    folder: Path, more: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as if alone, decoded by one call; prompts of three lengths."""
    calls, original = list[int](), text_module.generate

    def counted(model: Any, prompts: Any, *args: Any) -> Any:
        calls.append(len(prompts))
        return original(model, prompts, *args)

    monkeypatch.setattr(text_module, "generate", counted)
    prompts, options = ("def f(self)", "class", "return value"), ("--max-tokens", 24, "--device", "cpu", *more)
    wanted = ""
    for number, prompt in enumerate(prompts, start=1):
        assert _longctx("generate", folder, "--prompt", prompt, *options) == 0
        wanted += f"--- {number} ---\n{capsys.readouterr().out}"
    assert not calls
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert _longctx("generate", folder, *words, *options) == 0
    assert capsys.readouterr().out == wanted and calls == [3]


def test_chunks_and_caches_of_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chunks change nothing, neither does a cache that keeps everything; one that keeps little does."""
    found = {}
    prompt = "def f(self): return value " * 12
    small = [("--keep", 40, "--scorer", name) for name in ("random", "representation-shift", "expected-attention")]
    moving = ("--keep", 40, "--scorer", "expected-attention", "--positions", "cache")
    for extra in ((), ("--chunk", 7), ("--keep", 4096), ("--offload", 0), ("--cache-bits", 8), *small, moving):
        options = ("--max-tokens", 24, "--device", "cpu", "--temperature", 1.0, "--chunk", 700, *extra)
        assert _longctx("generate", folder, "--prompt", prompt, *options) == 0
        found[extra] = capsys.readouterr().out
    assert found["--chunk", 7] == found["--keep", 4096] == found["--offload", 0] == found[()]
    assert found["--keep", 40, "--scorer", "random"] != found[()]


def test_speculation_beside_a_compression(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy text of a compressed cache, which is not that of a full one, with and without proposals."""
    prompt = ["--prompt", "def f(self): return value " * 12, "--max-tokens", 60, "--device", "cpu"]
    texts = []
    for more in ((), ("--keep", 0.3), ("--keep", 0.3, "--speculate", "lookup")):
        assert _longctx("generate", folder, *prompt, *more) == 0
        found = capsys.readouterr()
        texts.append(found.out)
        assert ("tokens per pass" in found.err) == ("lookup" in more)
    assert texts[0] != texts[1] == texts[2]


def test_names_of_scorers_and_positions_reach_the_cache() -> None:
    parser = argparse.ArgumentParser()
    generate_cmd.add_arguments(parser)
    for name, where in generate_cmd.SCORERS.items():
        for words, positions in (((), "text"), (("--positions", "cache"), "cache")):
            args = parser.parse_args(["folder", "--keep", "0.25", "--scorer", name, *words])
            compression = generate_cmd._cache(args, None, None).compression
            assert compression is not None
            assert type(compression.scorer).__name__ == where.partition(".")[2]
            assert (compression.policy.ratio, compression.policy.positions) == (0.25, positions)


@pytest.fixture(scope="module")
def unwindowed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without sliding windows."""
    root = tmp_path_factory.mktemp("unwindowed")
    vocab = load_tokenizer(folder)
    more = {"sliding_window": None, "window_layers": None, "vocab_size": vocab.vocab_size, "eos_token_id": 2}
    config = Model.model_validate({**CONFIG.model_dump(), **more})
    save_hf(CausalLM(config, seed=1), config, root / "hf", folder)
    return root / "hf"


def test_windows_on_the_command_line(unwindowed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One window, or several of which the prompt's own place or choice matters."""
    words, files = ["def", "f(self):", "return", "value", "of", "the", "stored", "tensors"], []
    for number, word in enumerate(words):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(f" {word}" * (6 + number))
    tail, options = " value", ("--max-tokens", 24, "--device", "cpu", "--temperature", 1.0)

    def written(*args: object) -> str:
        assert _longctx("generate", unwindowed, *options, *args) == 0
        return capsys.readouterr().out

    every = ("--prompt", tail, "--sink", "class", "--windows", *files)
    texts = [
        written(*every), written(*every, "--keep-windows", 2), written(*every, "--query-after", "total"),
        written("--prompt", tail, "--windows", *files),
    ]  # fmt: skip
    assert len(set(texts)) == len(texts)
    assert written(*every, "--keep-windows", len(files)) == texts[0]


@pytest.mark.tier2
def test_ranks_write_what_one_writes(folder: Path, unwindowed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "def f(self): return value " * 12, "--max-tokens", "24", "--device", "cpu"]
    windows = ["--windows", __file__, str(Path(__file__).parents[1] / "small_mixers.py"), "--keep-windows", "1"]
    for model, more in ((folder, []), (folder, ["--keep", "0.3"]), (unwindowed, windows)):
        assert _longctx("generate", model, *prompt, *more) == 0
        alone = capsys.readouterr().out
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        words = [*command, "-m", "longctx", "generate", str(model), *prompt, *more]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone
        assert "every process runs the whole prompt" not in done.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--top-p", "2"), "top_p 2.0 is out of range"),
        (("--prompt", "a", "--max-tokens", "0"), "--max-tokens must be at least 1"),
        (("--file", "nowhere.txt"), "cannot read the text nowhere.txt"),
        (("--prompt", "a", "--chunk", "0"), "--chunk must be at least 1"),
        (("--prompt", "a", "--scorer", "tova"), "--scorer tova has no effect without --keep"),
        (("--prompt", "a", "--positions", "cache"), "--positions cache has no effect without --keep"),
        (("--prompt", "a", "--offload", "few"), "--offload: "),
        (("--prompt", "a", "--offload", 9, "--neighbours", 4), "leave search or offload out"),
        (("--prompt", "a", "--offload", 9, "--keep", 40, "--positions", "cache"), "or leave offload out"),
        (("--prompt", "a", "--keep", "1.5"), "--keep 1.5 is neither a number of tokens nor a share"),
        (("--prompt", "a", "--keep", "-3"), "--keep"),
        (
            ("--prompt", "a", "--speculate", "heads"),
            "has no proposal heads; train some (model.proposals) or use lookup",
        ),
        (
            ("--prompt", "a", "--speculate", "lookup", "--temperature", "0.5"),
            "--speculate lookup: speculation reproduces greedy decoding, not draws at temperature 0.5",
        ),
        (("--prompt", "a", "--keep", "8"), "tokens 8 is below the 4 sinks and 32 recent tokens"),
        (("--prompt", "a", "--sink", "b"), "--sink b has no effect without --windows"),
        (("--prompt", "a", "--windows", __file__, "--window-score", "mean"), "no effect without --keep-windows"),
        (("--prompt", "a", "--windows", __file__, "--keep", "0.5"), "--keep 0.5 does not go with --windows"),
        (
            ("--prompt", "a", "--prompt", "b", "--speculate", "lookup"),
            "--speculate goes with one prompt, and --prompt gives 2; leave one out",
        ),
        (("--prompt", "a", "--prompt", "b", "--windows", __file__), "--windows goes with one prompt, and"),
        (("--prompt", "a", "--prompt", "b", "--load", "state"), "--load goes with one prompt, and"),
        (("--prompt", "a", "--load", "state", "--cache-bits", "8"), "--cache-bits 8 has no effect with --load"),
        (("--prompt", "a", "--load", "state", "--windows", __file__), "--windows does not go with --load"),
        (("--prompt", "a", "--save", "state", "--speculate", "lookup"), "--speculate lookup does not go with --save"),
        (("--prompt", "a", "--save", "state", "--loki", __file__), "leave it or --save out"),
        (("--prompt", "a", "--save", "nowhere/state"), "there is no folder nowhere; make it first"),
        (("--prompt", "a", "--load", "nowhere"), "cannot read the decode state nowhere"),
        (("--prompt", "a", "--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--prompt", "b", "--stop", ""), "a stop string is empty; leave it out"),
        (("--prompt", "a", "--windows", "nowhere.txt"), "cannot read the text nowhere.txt"),
        (("--prompt", "a", "--windows", __file__), "layer 1 has a sliding window of 6 tokens"),
    ],
)
def test_generate_command_refuses(
    args: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _longctx("generate", folder, *args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_export_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("fp32", "bf16"):
        assert (
            _longctx("export", folder, "--out", tmp_path / dtype, "--dtype", dtype, "--check", "--max-shard", "40k")
            == 0
        )
        out = capsys.readouterr().out
        assert float(out.split("own class: ")[1].split()[0]) <= 1e-4
        assert len(list((tmp_path / dtype).glob("model-*.safetensors"))) > 1
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / dtype).eos_token_id == 2


def test_export_command_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        ((folder, "--out", tmp_path / "x", "--family", "llama"), "set model.family to qwen3"),
        ((folder, "--out", folder), "already holds another result; choose another --out or add --overwrite"),
        ((folder, "--out", tmp_path / "x", "--max-shard", "many"), "--max-shard: 'many' is not a whole number"),
        ((tmp_path / "nothing", "--out", tmp_path / "x"), "nothing"),
    ]
    for args, message in cases:
        assert _longctx("export", *args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_wrong_export_fails_the_check(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from longctx.model import hf_save

    wrong = hf_save.to_hf_config

    def tampered(config: Model, dtype: str = "float32") -> dict[str, Any]:
        return {**wrong(config, dtype), "rms_norm_eps": 0.1}

    monkeypatch.setattr(hf_save, "to_hf_config", tampered)
    assert _longctx("export", folder, "--out", tmp_path / "x", "--check") == 2
    assert "does not reproduce the model" in capsys.readouterr().err
