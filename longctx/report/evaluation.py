"""Results of an evaluation as a small table."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from longctx.report import units


def results_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line per number; accuracies stand beside their chance level."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("remark", style="dim")
    for line in (*_perplexity(results), *_unigram(results), *_needle(results)):
        table.add_row(*line)
    return table


def _perplexity(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    if (scores := results.get("perplexity")) is None:
        return
    yield "held-out loss", units.fixed(scores["loss"], 4), f"nats per token, {scores['tokens']:,} tokens"
    yield "perplexity", units.fixed(scores["perplexity"], 2), ""
    yield "bits per byte", units.fixed(scores["bits_per_byte"], 3), ""
    for entry in scores["bins"]:
        remark = f"{entry['start']:,} to {entry['stop'] - 1:,} tokens of context, {entry['count']:,} targets"
        yield "perplexity by position", units.fixed(entry["perplexity"], 2), remark
    if scores["gain"]:
        first, last = scores["gain"]["curve"][0], scores["gain"]["curve"][-1]
        remark = f"nats per token, {last['context']:,} against {first['context']:,} tokens of context"
        yield "gain from context", units.fixed(first["loss"] - last["loss"], 4), remark


def _unigram(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    if (scores := results.get("unigram")) is None:
        return
    yield "unigram entropy", units.fixed(scores["entropy"], 4), f"nats per token, {scores['train_tokens']:,} tokens"
    yield "unigram held-out loss", units.fixed(scores["heldout_cross_entropy"], 4), "add-one smoothing"


def _needle(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    if (scores := results.get("needle")) is None:
        return
    chance = f"chance {units.share(scores['chance'])}"
    for length in sorted({cell["length"] for cell in scores["cells"]}):
        row = [cell["choice_accuracy"] for cell in scores["cells"] if cell["length"] == length]
        yield "needle, multiple choice", units.share(sum(row) / len(row)), f"context of {length:,} tokens, {chance}"
    samples = f"{scores['samples']} samples"
    yield "needle, multiple choice", units.share(scores["choice_accuracy"]), f"all lengths, {samples}, {chance}"
    yield "needle, greedy decoding", units.share(scores["greedy_accuracy"]), f"all lengths, {samples}"
