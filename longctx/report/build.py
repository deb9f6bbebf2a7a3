"""``longctx report``: from a run folder to PNG files and one HTML page."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longctx import __version__
from longctx.errors import LongctxError
from longctx.report import html, plots
from longctx.report.metrics import Metrics, read_metrics
from longctx.report.style import DARK, LIGHT, Theme
from longctx.report.summary import Evaluations, summarize

PAGE = "index.html"


@dataclass(frozen=True)
class _Figure:
    name: str
    description: str
    draw: Callable[[Path, Theme], None]


def build_report(run: Path, out: Path | None = None) -> list[Path]:
    """Write every figure the run has data for, and index.html, to ``out`` (default: RUN/report).

    Files appear in ``out`` only when all of them are complete. Returns their paths, the page last.

    Raises:
        LongctxError: no such run, nothing logged yet, an unreadable evaluation, or ``out`` cannot be written.
    """
    if not run.is_dir():
        raise LongctxError(
            f"no run folder at {run}; give the folder that `longctx train` wrote (key `run` of its config)"
        )
    metrics = read_metrics(run / "metrics.jsonl")
    evaluations = read_evaluations(run)
    text = _config_text(run / "config.yaml")
    out = out or run / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".incomplete-") as scratch:
            names = _write_all(Path(scratch), run, metrics, evaluations, text)
            for name in names:
                os.replace(Path(scratch, name), out / name)
    except OSError as error:
        raise LongctxError(
            f"cannot write the report to {out}: {error.strerror}; choose another folder with --out"
        ) from None
    return [out / name for name in names]


def read_evaluations(run: Path) -> Evaluations:
    """Results under RUN/eval; tasks that were not run are None."""
    return Evaluations(*(_read_json(run / "eval" / f"{task}.json") for task in ("perplexity", "needle", "unigram")))


def _write_all(folder: Path, run: Path, metrics: Metrics, evaluations: Evaluations, config: str) -> list[str]:
    names, pictures = [], []
    for figure in _figures(metrics, evaluations):
        name = f"{figure.name}.png"
        figure.draw(folder / name, LIGHT)
        figure.draw(folder / "dark.png", DARK)
        pictures.append(
            html.Picture((folder / name).read_bytes(), (folder / "dark.png").read_bytes(), figure.description)
        )
        names.append(name)
    settings = _settings(config)
    facts = summarize(metrics, settings, evaluations, _model(run, settings))
    title = run.resolve().name
    page = html.render(title, _lead(metrics), facts, pictures, config or "config.yaml was not found", __version__)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return [*names, PAGE]


def _figures(metrics: Metrics, evaluations: Evaluations) -> Iterator[_Figure]:
    entropy = evaluations.entropy
    yield _Figure("loss", "Training and validation loss", lambda path, theme: plots.loss(metrics, entropy, path, theme))
    yield _Figure("throughput", "Tokens per second", lambda path, theme: plots.throughput(metrics, path, theme))
    yield _Figure(
        "optimization", "Gradient norm and learning rate", lambda path, theme: plots.optimization(metrics, path, theme)
    )
    if (by_position := evaluations.perplexity) is not None:
        yield _Figure(
            "perplexity", "Perplexity by position", lambda path, theme: plots.perplexity(by_position, path, theme)
        )
        if by_position.get("gain"):
            yield _Figure(
                "context_gain", "Gain from context", lambda path, theme: plots.context_gain(by_position, path, theme)
            )
    if (retrieval := evaluations.needle) is not None:
        yield _Figure("needle", "Needle retrieval", lambda path, theme: plots.needle(retrieval, path, theme))


def _lead(metrics: Metrics) -> str:
    kinds = [event["event"] for event in metrics.events if event.get("event") in ("start", "resume", "end")]
    state = "complete" if kinds and kinds[-1] == "end" else "not finished"
    return f"Training run, {state} at step {metrics.train[-1]['step']:,}."


def _config_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _settings(config: str) -> Mapping[str, Any]:
    """The config's values for the summary; a report of an old or damaged run says n/a rather than nothing at all."""
    try:
        values = yaml.safe_load(config)
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}


def _model(run: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Section of the trained model: from the newest checkpoint, since a config may take its shapes from a folder."""
    for path in sorted(run.glob("checkpoints/step-*/model.json"), reverse=True):
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
    section = settings.get("model")
    return section if isinstance(section, Mapping) else {}


def _read_json(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict) or value.get("task") != path.stem:
        raise LongctxError(f"{path} is not a result of `longctx eval`; delete it or run `longctx eval` again")
    return value
