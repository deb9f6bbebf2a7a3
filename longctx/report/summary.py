"""The numbers of a run that a reader wants first, from its metrics, config and evaluations."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from longctx.report import units
from longctx.report.metrics import Metrics


@dataclass(frozen=True)
class Evaluations:
    """Contents of the run's eval/*.json; None where a task was not run."""

    perplexity: Mapping[str, Any] | None = None
    needle: Mapping[str, Any] | None = None
    unigram: Mapping[str, Any] | None = None

    @property
    def entropy(self) -> float | None:
        """Unigram entropy of the training split in nats per token."""
        return None if self.unigram is None else float(self.unigram["entropy"])


@dataclass(frozen=True)
class Fact:
    """One line of the summary: what, its value, and a remark (may be empty)."""

    name: str
    value: str
    remark: str = ""


def summarize(
    metrics: Metrics, config: Mapping[str, Any], evaluations: Evaluations, model: Mapping[str, Any]
) -> list[Fact]:
    """Facts about a run in reading order. What is unknown says n/a; losses are nats per token.

    Args:
        model: section of the model that was trained.
    """
    shape = [_text(model.get(key)) for key in ("family", "num_layers", "hidden_size", "num_heads")]
    return [
        *_losses(metrics, evaluations),
        *_evaluated(evaluations),
        *_costs(metrics),
        *_setting(metrics, config),
        Fact("Model", shape[0], f"{shape[1]} layers, width {shape[2]}, {shape[3]} heads"),
    ]


def _losses(metrics: Metrics, evaluations: Evaluations) -> Iterator[Fact]:
    last = metrics.train[-1]
    yield Fact("Final training loss", units.fixed(last.get("loss"), 4), f"nats per token, step {last['step']}")
    steps, held = metrics.series("loss", "valid")
    finite = [(loss, step) for step, loss in zip(steps, held, strict=True) if math.isfinite(loss)]
    if finite:
        loss, step = min(finite)
        yield Fact("Best validation loss", units.fixed(loss, 4), f"nats per token, step {step}")
    else:
        yield Fact("Best validation loss", units.MISSING, "no held-out loss was logged")
    known = evaluations.entropy is not None
    remark = "nats per token of the training split" if known else "`longctx eval` measures it"
    yield Fact("Unigram entropy", units.fixed(evaluations.entropy, 4), remark)


def _evaluated(evaluations: Evaluations) -> Iterator[Fact]:
    if (scores := evaluations.perplexity) is not None:
        yield Fact("Held-out perplexity", units.fixed(scores["perplexity"], 2), f"{scores['tokens']:,} tokens")
        yield Fact("Bits per byte", units.fixed(scores["bits_per_byte"], 3), "held-out text")
    if (scores := evaluations.needle) is not None:
        chance = f"multiple choice, chance {units.share(scores['chance'])}, {scores['samples']} samples"
        yield Fact("Needle retrieval", units.share(scores["choice_accuracy"]), chance)


def _costs(metrics: Metrics) -> Iterator[Fact]:
    yield Fact("Tokens seen", units.count(metrics.train[-1].get("tokens")))
    yield Fact("Throughput", f"{units.count(metrics.median('tokens_per_second'))} tok/s", "median, whole world")
    mfu = metrics.median("mfu")
    yield Fact("MFU", units.share(mfu), "median" if mfu is not None else "peak of this device is unknown")
    yield Fact("Peak memory", units.memory(max(metrics.series("peak_memory")[1], default=None)), "per rank")
    stops = len(metrics.interruptions)
    resumed = f"resumed {stops} time{'' if stops == 1 else 's'}" if stops else ""
    yield Fact("Time in training", units.duration(metrics.seconds), resumed)


def _setting(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Fact]:
    total = _get(config, "train", "steps")
    skipped = sum(bool(record.get("skipped")) for record in metrics.train)
    yield Fact("Steps", f"{metrics.train[-1]['step']}/{_text(total)}", f"{skipped} skipped" if skipped else "")
    processes = metrics.latest_event("pids")
    yield Fact("World", _text(len(processes) if isinstance(processes, list) else None), "processes")
    layout = " ".join(_text(_get(config, "sequence", key)) for key in ("layout", "scheme"))
    yield Fact("Sequence degree", _text(_get(config, "sequence", "degree")), layout)
    yield Fact("Sequence length", _text(_get(config, "sequence", "length")), "tokens")
    engine, zero = _text(_get(config, "engine", "kind")), _text(_get(config, "engine", "zero"))
    zero = f", ZeRO {zero}" if engine == "deepspeed" else ""
    yield Fact("Engine", engine + zero, _text(_get(config, "train", "precision")))


def _get(config: Mapping[str, Any], section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, Mapping) else None


def _text(value: Any) -> str:
    if value is None:
        return units.MISSING
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
