"""``longctx bench cache``: what a model still finds in a cache of which a part was thrown away.

By method and share kept. The context is read, compressed at its end, and only then comes the question: a method cannot
know what will be asked (the way of kvpress). Nothing is protected but what a method itself prescribes, so that budgets
are equal. Loki and neighbours throw nothing away: the share is what a question looks at.

Legend: B rows, T tokens of a context, Q = 2 tokens of a question.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longctx.bench.retrieval import QUESTION, VOCAB, Entries
from longctx.cache import scorers
from longctx.cache.compress import Compression, Policy
from longctx.cache.expected import ExpectedAttention
from longctx.cache.loki import Loki
from longctx.cache.neighbours import Neighbours
from longctx.cache.options import CacheOptions
from longctx.cache.ragged import all_compressed
from longctx.cache.representation import RepresentationShift
from longctx.errors import ConfigError
from longctx.generate.calibrate import key_bases
from longctx.generate.decode import Decoded, LanguageModel, advance

__all__ = ["METHODS", "SHARES", "TASKS", "VOCAB", "WINDOW", "Found", "Method"]
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
WINDOW = 8
"""Queries that SnapKV looks at, whose tokens it keeps."""


Bases = Mapping[int, Tensor]
Method = Callable[[float, int, Bases], CacheOptions]
"""How a cache of so many tokens is to be stored where a share of them stays or is looked at, given Loki's bases."""


def evicting(
    scorer: scorers.Scorer,
    sinks: int = 0,
    recent: int = 0,
    adaptive: bool = False,
    positions: Literal["text", "cache"] = "text",
) -> Method:  # fmt: skip
    """A scorer, and what its paper protects or shares."""

    def options(share: float, tokens: int, bases: Bases) -> CacheOptions:
        policy = Policy(ratio=share, sinks=sinks, recent=recent, adaptive=adaptive, positions=positions, every=1 << 30)
        return CacheOptions(block=16, compression=Compression(scorer, policy))

    return options


def loki(share: float, tokens: int, bases: Bases) -> CacheOptions:
    """All tokens stay; a query looks at the share that ranks highest by a quarter of the coordinates."""
    return CacheOptions(block=16, search=Loki(bases, ratio=share))


def neighbours(share: float, tokens: int, bases: Bases) -> CacheOptions:
    """All tokens stay; a query looks at those nearest to it, found in an index."""
    return CacheOptions(block=16, search=Neighbours(max(1, int(share * tokens)), every=1))


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "random": evicting(scorers.Random()),
        "key-norm": evicting(scorers.KeyNorm()),
        "key-norm, adaptive": evicting(scorers.KeyNorm(), adaptive=True),
        "key-diff": evicting(scorers.KeyDiff()),
        "snapkv": evicting(scorers.SnapKV(WINDOW), recent=WINDOW),
        "snapkv, adaptive": evicting(scorers.SnapKV(WINDOW), recent=WINDOW, adaptive=True),
        "tova": evicting(scorers.TOVA()),
        "expected-attention": evicting(ExpectedAttention(), sinks=4),
        "representation-shift": evicting(RepresentationShift(), recent=1),
        "recency": evicting(scorers.Recency(), sinks=4),
        "recency, positions in the cache": evicting(scorers.Recency(), sinks=4, positions="cache"),
        "loki": loki,
        "neighbours": neighbours,
    }
)


def available() -> list[str]:
    """Methods that can be measured here: without faiss there are no neighbours."""
    return [name for name in METHODS if name != "neighbours" or find_spec("faiss") is not None]


TASKS: Mapping[str, int] = MappingProxyType({"needle": 1, "multi-key": 8})
"""Entries in a context, of which one is asked for."""


@dataclass(frozen=True)
class Found:
    """Share of right answers of one method at one budget, or of a model at the share that it keeps by itself."""

    task: str
    method: str
    share: float
    accuracy: float


def questions(task: str, length: int, rows: int, seed: int) -> dict[str, list[Any]]:
    """Contexts, questions and answers as token ids; rows that training did not see.

    Args:
        length: tokens of a row in training; contexts are a multiple of 16 so that shares are whole numbers.
    """
    context = (length - QUESTION) // 16 * 16
    source = Entries(context + QUESTION, 1, (TASKS[task], TASKS[task]), seed)
    drawn = np.stack([source.row(10**9 + row)[0] for row in range(rows)])
    return {
        "contexts": drawn[:, :context].tolist(), "questions": drawn[:, context:-1].tolist(),
        "answers": drawn[:, -1].tolist(),
    }  # fmt: skip


def bases(model: LanguageModel, tokens: int, seed: int, rows: int = 32) -> Bases:
    """Loki's, of contexts of ``tokens`` that neither training nor questions have seen."""
    source = Entries(tokens + QUESTION, 1, (max(TASKS.values()),) * 2, seed)
    drawn = [source.row(2 * 10**9 + row)[0][:tokens].tolist() for row in range(rows)]
    found = key_bases(model, [token for row in drawn for token in row], tokens)
    return {layer: basis_KEE for layer, (basis_KEE, _) in found.items()}


def accuracy(model: LanguageModel, asked: Mapping[str, list[Any]], cache: CacheOptions) -> float:
    """Share of right answers."""
    return answered(model, asked, after_context(model, asked, cache))


@torch.no_grad()
def after_context(model: LanguageModel, asked: Mapping[str, list[Any]], cache: CacheOptions) -> Decoded:
    """What a question comes to: contexts that were read, in a cache compressed at their end."""
    _, done = advance(model, torch.tensor(asked["contexts"]), cache=cache)
    return done._replace(state=all_compressed(done.state))


@torch.no_grad()
def answered(model: LanguageModel, asked: Mapping[str, list[Any]], done: Decoded) -> float:
    """Share of right answers to the questions behind these contexts."""
    hidden_BQD, _ = advance(model, torch.tensor(asked["questions"]), done)
    said_B: Tensor = model.logits(hidden_BQD[:, -1:])[:, 0].argmax(-1)
    return float((said_B == torch.tensor(asked["answers"])).double().mean())


def measure(
    model: LanguageModel, asked: Mapping[str, Mapping[str, list[Any]]], names: Sequence[str],
    advance_to: Callable[[str], None] = lambda _: None,
) -> list[Found]:  # fmt: skip
    """Every task, method and share; the share 1 is measured with the method at work, not assumed.

    Raises:
        ConfigError: an unknown method.
    """
    if unknown := sorted(set(names) - set(METHODS)):
        raise ConfigError(f"--methods {unknown[0]} is unknown; choose from {', '.join(METHODS)}")
    found = []
    tokens = min(len(rows["contexts"][0]) for rows in asked.values())
    bases_of_keys = bases(model, tokens, seed=0)
    for task, rows in asked.items():
        for name in names:
            advance_to(f"{task}: {name}")
            for share in SHARES:
                cache = METHODS[name](share, tokens, bases_of_keys)
                found.append(Found(task, name, share, accuracy(model, rows, cache)))
    return found


def read_reference(path: Path) -> list[Found]:
    """What tools/kvpress_reference.py wrote.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        return [Found(**row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--compare {path}: {error}; give a file that tools/kvpress_reference.py wrote") from None


def as_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    """For a file."""
    return [asdict(row) for row in found]


def table(found: Sequence[Found], reference: Sequence[Found] = ()) -> list[str]:
    """Percent of right answers as lines of text, beside those of kvpress where it was run.

    A model that keeps a share of its own has a line to itself, under the budget nearest to that share.
    """
    theirs = {(row.task, row.method, row.share): row.accuracy for row in reference}
    lines = [f"| task | method | {' | '.join(f'{share:g} kept' for share in SHARES)} |", "|---" * 7 + "|"]
    ours: dict[tuple[str, str, int], dict[float, str]] = {}
    for number, row in enumerate(found):
        cell, share = f"{100 * row.accuracy:.0f}", row.share
        if row.method not in METHODS:
            ours[row.task, row.method, number] = {_nearest(share): f"{cell} at {share:.3f}"}
            continue
        other = theirs.get((row.task, row.method, share))
        cell += "" if other is None else f" ({100 * other:.0f})"
        ours.setdefault((row.task, row.method, -1), {})[share] = cell
    for (task, method, _), cells in ours.items():
        lines.append(f"| {task} | {method} | {' | '.join(cells.get(share, '') for share in SHARES)} |")
    return lines


def _nearest(share: float) -> float:
    return min(SHARES, key=lambda budget: abs(math.log(budget / share)))


def plot(found: Sequence[Found], reference: Sequence[Found], path: Path) -> None:
    """Accuracy over the share kept, a panel per task, lines ours and rings kvpress's, as PNG.

    A star is a model that keeps a share of its own.
    """
    from longctx.report.style import LIGHT, figure, headline

    tasks = list(dict.fromkeys(row.task for row in found))
    names = list(dict.fromkeys(row.method for row in found))
    with figure(LIGHT, path, height=4.2, columns=2) as panels:
        for axes, task in zip(panels, tasks, strict=True):
            headline(axes, task, "right answers over the share of the cache that stays", LIGHT)
            for number, name in enumerate(names):
                style, line = {"color": f"C{number % 10}", "linewidth": 1.3}, "-" if number < 10 else "--"
                ours, theirs = (
                    sorted((row.share, row.accuracy) for row in rows if (row.task, row.method) == (task, name))
                    for rows in (found, reference)
                )
                line = line if name in METHODS else "*"
                axes.semilogx(*zip(*ours, strict=True), line, base=2, label=name, **style)
                if theirs:
                    axes.semilogx(*zip(*theirs, strict=True), "o", base=2, markerfacecolor="none", **style)
            axes.set_xticks(SHARES, [f"{share:g}" for share in SHARES])
            axes.set_ylim(-0.02, 1.6)  # room for the legend
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
            axes.minorticks_off()
        panels[0].legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
