"""``longctx bench recall``: does a state over segments remember? One fact, asked for again at the end of every segment.

A row has ``segments`` segments of random symbols. Somewhere in the first stands a fact, a kind of token that occurs
nowhere else; the last token of every segment asks which it was, and only there is a label. A decoder without memory can
answer in the first segment alone and guesses elsewhere.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longctx.config.schema import Config, Model
from longctx.model.decoder import CausalLM
from longctx.model.head import IGNORED
from longctx.recurrence import with_recurrence
from longctx.runtime.mesh import Mesh
from longctx.sequence.layout import Run
from longctx.train.batches import read_micro_batches
from longctx.train.setup import build_engine
from longctx.train.trainer import Callback, Record, Trainer

Int64Array = npt.NDArray[np.int64]

SYMBOLS = 16
"""Kinds of noise, numbered from 0, and kinds of facts, numbered from there."""
ASK = 2 * SYMBOLS


@dataclass(frozen=True)
class Facts:
    """Rows of the task; row r of a seed is always the same."""

    segments: int
    segment: int
    seed: int

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.segments * self.segment

    def documents(self, row: int) -> tuple[int, ...]:
        """One per row."""
        return (0,)

    def read(self, row: int, runs: Sequence[Run]) -> tuple[Int64Array, Int64Array]:
        """Tokens and labels of the runs."""
        generator = np.random.default_rng((self.seed, row))
        tokens = generator.integers(0, SYMBOLS, self.length)
        fact = SYMBOLS + int(generator.integers(0, SYMBOLS))
        tokens[int(generator.integers(0, self.segment - 1))] = fact
        tokens[self.segment - 1 :: self.segment] = ASK
        labels = np.where(tokens == ASK, fact, IGNORED)
        index = np.concatenate([np.empty(0, np.int64), *(np.arange(*run) for run in runs)])
        return tokens[index], labels[index]


@dataclass(frozen=True)
class Recall:
    """What one kind learned.

    Args:
        losses: of every step.
        accuracy: share of right answers at the end of each of the segments trained on.
        further: segments -> share of right answers at the end of the last of so many.
    """

    kind: str
    losses: tuple[float, ...]
    accuracy: tuple[float, ...]
    further: dict[int, float]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment.

    Args:
        segments: of a row at the end and for the most part. Rows begin with 2 and double every ``shorter`` steps, the
            curriculum of Bulatov et al. (arXiv 2304.11062): with long rows alone it takes long to find the first fact.
        steps: all of them.
    """

    segments: int = 16
    segment: int = 16
    steps: int = 500
    shorter: int = 100
    batch: int = 32
    width: int = 64
    layers: int = 2
    memory: int = 4
    lr: float = 1e-3
    seed: int = 0

    def stages(self) -> list[tuple[int, int]]:
        """Segments of a row until which step."""
        shorter = [2**i for i in range(1, self.segments.bit_length()) if 2**i < self.segments]
        found = [(min(self.steps, self.shorter * (i + 1)), segments) for i, segments in enumerate(shorter)]
        return [*found, (self.steps, self.segments)]


class _Losses(Callback):
    def __init__(self, advance: Callable[[int, float], None]) -> None:
        self.losses: list[float] = []
        self._advance = advance

    def on_record(self, trainer: Trainer, record: Record) -> None:
        if record["kind"] == "train":
            self.losses.append(record["loss"])
            self._advance(record["step"], record["loss"])


def recall(kind: str, plan: Plan, mesh: Mesh, advance: Callable[[int, float], None] = lambda *_: None) -> Recall:
    """Train ``kind`` (rmt, armt, or none: segments without memory) on the current world, then ask; collective."""
    started = time.perf_counter()
    config, model_config = _config(kind, plan, mesh)
    model = with_recurrence(CausalLM(model_config, seed=plan.seed), plan.seed)
    facts, watch = Facts(plan.segments, plan.segment, plan.seed), _Losses(advance)
    trainer = Trainer(config, model_config, mesh, build_engine(config, model, mesh), facts, [watch])
    for until, segments in plan.stages():
        stage = _asking(trainer, replace(facts, segments=segments))
        while trainer.progress.step < until:
            stage.log(stage.step())
    further = {
        n: _accuracy(trainer, replace(facts, segments=n))[-1]
        for n in (plan.segments, 2 * plan.segments, 4 * plan.segments)
    }
    seconds = time.perf_counter() - started
    return Recall(kind, tuple(watch.losses), tuple(_accuracy(trainer, facts)), further, seconds)


def _config(kind: str, plan: Plan, mesh: Mesh) -> tuple[Config, Model]:
    recurrence: dict[str, Any] = {"kind": kind, "segment": plan.segment, "memory": plan.memory}
    if kind == "none":
        recurrence |= {"kind": "rmt", "memory": 0}
    if kind == "armt":
        recurrence["keys"] = 16
    model = Model.model_validate(
        {
            "vocab_size": ASK + 1, "hidden_size": plan.width, "num_layers": plan.layers, "num_heads": 4,
            "intermediate_size": 2 * plan.width, "init_std": 0.05, "recurrence": recurrence,
        }
    )  # fmt: skip
    config = Config.model_validate(
        {
            "run": "unused",
            "data": {"sources": [{"path": "unused"}]},
            "sequence": {"length": plan.segments * plan.segment, "degree": mesh.sequence.size},
            "train": {
                "steps": plan.steps, "batch": plan.batch, "micro_batch": plan.batch, "lr": plan.lr,
                "weight_decay": 0.01, "schedule": {"kind": "cosine", "warmup": min(50, plan.steps // 4)},
            },
            "engine": {"kind": "torch"},
        }
    )  # fmt: skip
    return config, model


def _asking(trainer: Trainer, facts: Facts) -> Trainer:
    """The same training with rows of another length."""
    sequence = trainer.config.sequence.model_copy(update={"length": facts.length})
    return replace(trainer, config=trainer.config.model_copy(update={"sequence": sequence}), rows=facts)


@torch.no_grad()
def _accuracy(trainer: Trainer, facts: Facts, rows: int = 256) -> list[float]:
    """Share of right answers at the end of every segment, over rows that training never saw."""
    asking = _asking(trainer, facts)
    first = 10**9  # far behind the rows of any training
    right = torch.zeros(facts.segments, dtype=torch.float64)
    for batch in read_micro_batches(facts, range(first, first + rows), 64, asking.context):
        model: Any = trainer.engine.module
        hidden = model(batch.tokens_BT, batch.context).hidden_BTD
        answers = model.logits(hidden).argmax(-1)
        ends = torch.from_numpy(batch.context.layout.indices(batch.context.rank)) // facts.segment
        hits = ((answers == batch.labels_BT) & (batch.labels_BT != IGNORED)).double().sum(0)
        right.index_add_(0, ends, hits)
    return (trainer.mesh.all_reduce(right) / rows).tolist()
