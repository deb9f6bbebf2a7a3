"""``longctx bench training``: every mechanism in one decoder, trained on one corpus for equally many tokens.

One process. All variants have the sizes of the config, its data in its order, and its learning rate; none is tuned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from longctx.config.check import load_checked
from longctx.config.mixers import MIXER_NAMES
from longctx.config.schema import Config, Model
from longctx.config.schema import Sequence as SequenceSection
from longctx.mixers import MIXERS
from longctx.mixers.base import StateSize
from longctx.recurrence import KINDS
from longctx.runtime.launcher import Launch
from longctx.runtime.mesh import Mesh
from longctx.runtime.process import joined_world
from longctx.train.callbacks import Validation
from longctx.train.setup import build_trainer
from longctx.train.trainer import Callback, Record, Trainer

STATE_TOKENS = (2**12, 2**20)
"""Contexts at which decode states are compared: 4K and 1M tokens."""

DECODERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "block_transformer": {"block": {"size": 4}},
        "rmt": {"recurrence": {"kind": "rmt", "segment": 512, "memory": 16}},
        "armt": {"recurrence": {"kind": "armt", "segment": 512, "memory": 16}},
    }
)
"""Mechanisms of a whole decoder, as model sections."""
VARIANTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        **{name: (f"model.mixer={name}",) for name in MIXER_NAMES},
        **{name: tuple(f"model.{key}={value}" for key, value in model.items()) for name, model in DECODERS.items()},
    }
)
"""What is trained: a name, and the settings that make it."""


@dataclass(frozen=True)
class Trained:
    """One variant after training.

    Args:
        loss: mean nats per token of the held-out rows.
        tokens_per_second: median over steps.
        state_bytes: of the whole model's fp32 decode state of one sequence at each of :data:`STATE_TOKENS`.
    """

    name: str
    parameters: int
    tokens: int
    loss: float
    tokens_per_second: float
    state_bytes: tuple[int, ...]


@dataclass
class _Watch(Callback):
    advance: Callable[[str], None]
    records: list[Record] = field(default_factory=list)

    def on_record(self, trainer: Trainer, record: Record) -> None:
        if record["kind"] in ("train", "valid"):
            self.records.append(record)
            self.advance(f"step {record['step']}")

    def values(self, kind: str, key: str) -> list[float]:
        return [record[key] for record in self.records if record["kind"] == kind]


def train_all(
    config: Path, overrides: Sequence[str], names: Sequence[str], launch: Launch,
    done: Callable[[Trained], None], advance: Callable[[str], None] = lambda _: None,
) -> list[Trained]:  # fmt: skip
    """Train the named variants, one after the other.

    Args:
        config, overrides: as for ``longctx train``; its engine, run folder and layout over ranks are replaced.
        done: told of each when it is done.

    Raises:
        ConfigError: a config has a fault.
    """
    found = []
    with TemporaryDirectory() as folder:
        runs = {name: _overrides(name, overrides, Path(folder) / name) for name in names}
        # All faults before hours of training.
        checked = {name: load_checked(config, changed, 1) for name, changed in runs.items()}
        with joined_world(checked[names[0]].runtime, SequenceSection(length=1, degree=1), launch) as mesh:
            for name, own in checked.items():
                found.append(_train(name, own, mesh, partial(_told, advance, name)))
                done(found[-1])
    return found


def _told(advance: Callable[[str], None], name: str, text: str) -> None:
    advance(f"{name} {text}")


def _overrides(name: str, overrides: Sequence[str], run: Path) -> list[str]:
    alone = ["engine={kind: torch}", "sequence.degree=1", "sequence.layout=contiguous", f"run={run}"]
    return [*alone, "model.num_kv_heads=null", *VARIANTS[name], *overrides]


def _train(name: str, config: Config, mesh: Mesh, advance: Callable[[str], None]) -> Trained:
    at_the_end = config.train.model_copy(update={"eval_every": config.train.steps})
    config = config.model_copy(update={"train": at_the_end})
    trainer, watch = build_trainer(config, mesh), _Watch(advance)
    trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, Validation)] + [watch]
    trainer.run()
    numbers = sum(parameter.numel() for parameter in trainer.engine.module.parameters())
    size = model_state_size(trainer.model)
    state = tuple(4 * (size.per_sequence + tokens * size.per_token) for tokens in STATE_TOKENS)
    speed = median(watch.values("train", "tokens_per_second"))
    return Trained(name, numbers, trainer.progress.tokens, watch.values("valid", "loss")[-1], speed, state)


def model_state_size(model: Model) -> StateSize:
    """Numbers that all layers keep to decode, the most of any phase of a segment."""
    sizes = [MIXERS[name].state_size(model, layer) for layer, name in enumerate(model.mixers)]
    whole = StateSize(sum(size.per_token for size in sizes), sum(size.per_sequence for size in sizes))
    if (block := model.block) is not None:
        inside = model.token_layers * 2 * model.kv_heads * model.head_size * (block.prefix + block.size - 1)
        return StateSize(-(-whole.per_token // block.size), whole.per_sequence + inside)
    return whole if model.recurrence is None else KINDS[model.recurrence.kind].state_size(model, whole)


def table(found: Sequence[Trained]) -> list[str]:
    """The results as lines of text, the lowest loss first."""
    columns = ("mechanism", "held-out loss", "tokens/s", "parameters", "state KB at 4K tokens", "at 1M")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in sorted(found, key=lambda row: row.loss):
        state = " | ".join(f"{size / 1e3:,.0f}" for size in row.state_bytes)
        numbers = f"{row.loss:.3f} | {row.tokens_per_second:,.0f} | {row.parameters:,}"
        lines.append(f"| {row.name} | {numbers} | {state} |")
    return lines
