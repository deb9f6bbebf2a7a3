"""The whole path: text, tokens, training with a killed rank, resume, evaluation, export, report."""

import json
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from longctx.demo.commands import DemoFailed, longctx, torchrun
from longctx.demo.rehearsal import Repeated, kill_rank, repeated_steps
from longctx.report.metrics import read_metrics

PYTHON_FILES = ("--pattern", "*.py", "--exclude", "site-packages", "--errors", "skip")


@dataclass(frozen=True)
class Settings:
    """Where the demo works and how much of it runs."""

    config: Path
    folder: Path
    source: Path
    ranks: int
    vocabulary: int
    overrides: tuple[str, ...]


def default_source() -> Path:
    """The Python standard library of this interpreter: about 30 MB of long, real documents on any machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def run_demo(settings: Settings) -> None:
    """Run every step and print what came out of it.

    Raises:
        DemoFailed: a step failed, or a promise of the demo does not hold.
    """
    started = time.monotonic()
    killed_after = _step_to_kill_at(settings)
    folder, run = settings.folder, settings.folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = folder / "corpus", folder / "tokenizer"
    _title("1. A tokenizer and a corpus from the Python standard library")
    vocabulary = ("--vocab-size", str(settings.vocabulary))
    longctx("data", "tokenizer", settings.source, *PYTHON_FILES, *vocabulary, "--out", tokenizer, "--overwrite")
    longctx("data", "build", settings.source, *PYTHON_FILES, "--tokenizer", tokenizer, "--out", corpus, "--overwrite")
    _title(f"2. Training with every sequence cut over {settings.ranks} ranks, one of which is killed on the way")
    repeated = _train(settings, corpus, run, killed_after)
    _title("3. Perplexity by position, needle retrieval, unigram entropy")
    longctx("eval", run, "--samples", "2")
    _title("4. Export to a Hugging Face folder, checked against transformers")
    longctx("export", run, "--out", run / "export", "--check")
    _title("5. Report")
    longctx("report", run)
    _summary(run, repeated, (time.monotonic() - started) / 60)


def _train(settings: Settings, corpus: Path, run: Path, killed_after: int) -> Repeated:
    arguments = [
        "train", str(settings.config), f"run={run}", f"data.sources.0.path={corpus}",
        f"sequence.degree={settings.ranks}", *settings.overrides,
    ]  # fmt: skip
    log = settings.folder / "launch.log"
    process = torchrun(settings.ranks, 1, arguments, log)
    try:
        last = kill_rank(process, run / "metrics.jsonl", killed_after, settings.ranks - 1, log)
        print(
            f"demo: killed rank {settings.ranks - 1} with SIGKILL after step {last}; torchrun restarts the run",
            flush=True,
        )
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if status:
        raise DemoFailed(f"training ended with status {status}; see {log}")
    repeated = repeated_steps(run / "metrics.jsonl")
    if not repeated.equal:
        raise DemoFailed(f"the resumed run logged other losses: {repeated.before} before, {repeated.after} after")
    first, final = repeated.steps[0], repeated.steps[-1]
    print(f"demo: steps {first} to {final} ran twice, and their losses are equal digit for digit", flush=True)
    return repeated


def _step_to_kill_at(settings: Settings) -> int:
    """Half-way between two checkpoints in the middle of the run, so that some steps must be repeated.

    Raises:
        ConfigError, DemoFailed: the config is wrong, or too few steps or checkpoints for that.
    """
    from longctx.config.load import load_config

    config = load_config(settings.config, settings.overrides)
    steps, every = config.train.steps, config.checkpoint.every
    if not 0 < every <= steps // 2:
        raise DemoFailed(
            f"checkpoint.every = {every} must lie between 1 and half of train.steps = {steps} for the demo"
        )
    return steps // 2 // every * every + max(1, every // 2)


def _summary(run: Path, repeated: Repeated, minutes: float) -> None:
    metrics = read_metrics(run / "metrics.jsonl")
    last, valid = metrics.series("loss")[1][-10:], metrics.series("loss", "valid")[1]
    unigram = json.loads((run / "eval" / "unigram.json").read_text(encoding="utf-8"))
    final = sum(last) / len(last)
    _title("Result")
    print(f"final training loss     {final:.3f} nats per token (mean of the last {len(last)} steps)")
    if valid:
        print(f"held-out loss           {valid[-1]:.3f} nats per token")
    print(f"unigram entropy         {unigram['entropy']:.3f} nats per token: what guessing by frequency would reach")
    print(f"tokens per second       {metrics.median('tokens_per_second'):,.0f} (median step)")
    print(f"steps run twice         {repeated.steps[0]} to {repeated.steps[-1]}, losses equal digit for digit")
    print(f"minutes                 {minutes:.1f}")
    for name, path in {
        "checkpoints": run / "checkpoints", "Hugging Face folder": run / "export", "metrics": run / "metrics.jsonl",
        "evaluation": run / "eval", "report": run / "report" / "index.html",
    }.items():  # fmt: skip
        print(f"{name:<23} {path}")
    if final >= unigram["entropy"]:
        raise DemoFailed(f"the final loss {final:.3f} is not below the unigram entropy {unigram['entropy']:.3f}")


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
