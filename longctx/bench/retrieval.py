"""``longctx bench retrieval``: train a small decoder on a task that only retrieval solves.

A row is a context of noise with entries in it, each one token that stands for a key and its value, and questions behind
it: a mark, a key of the context, and its value, which alone has a label. One entry is a single needle, several are
multi-key retrieval. Keys that share a token with their values spare a small model the many steps in which it finds out
that a token belongs to the one before it; to find an entry by its key among others is what is measured.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from longctx.checkpoint.save import save_checkpoint
from longctx.config.load import load_config
from longctx.config.schema import Config, Model
from longctx.config.schema import Sequence as SequenceSection
from longctx.data.folders import check_target, new_folder
from longctx.errors import ConfigError
from longctx.model.decoder import CausalLM
from longctx.model.head import IGNORED
from longctx.model.hf_save import CONTENT, save_hf
from longctx.runtime.launcher import Launch
from longctx.runtime.process import joined_world
from longctx.sequence.layout import Run
from longctx.train.setup import build_engine
from longctx.train.trainer import Trainer

Int64Array = npt.NDArray[np.int64]

NOISE, KEYS, VALUES = 32, 16, 16
"""Kinds of noise, numbered from 0, of keys and of values."""
ENTRY = NOISE
"""The first entry: that of key k and value v is ``ENTRY + k * VALUES + v``."""
ASK = ENTRY + KEYS * VALUES
KEY, VALUE = ASK + 1, ASK + 1 + KEYS
"""The first key and the first value as they stand in questions."""
VOCAB = VALUE + VALUES
QUESTION = 3
"""Tokens of a question: the mark, a key, its value."""
_CHECKPOINTS = ("checkpoints",)
"""What is in the folder of a model that no Hugging Face family has a place for."""


@dataclass(frozen=True)
class Entries:
    """Rows of the task; row r of a seed is always the same.

    Args:
        length: tokens of a row.
        questions: at its end, each about an entry drawn at random.
        entries: least and most of them in a context, with keys of their own; each row draws its number.
    """

    length: int
    questions: int
    entries: tuple[int, int]
    seed: int = 0

    @property
    def context(self) -> int:
        """Tokens before the questions."""
        return self.length - QUESTION * self.questions

    def documents(self, row: int) -> tuple[int, ...]:
        """One per row."""
        return (0,)

    def row(self, row: int) -> tuple[Int64Array, Int64Array]:
        """All tokens and labels of a row."""
        generator = np.random.default_rng((self.seed, row))
        tokens, labels = generator.integers(0, NOISE, self.length), np.full(self.length, IGNORED)
        count = int(generator.integers(self.entries[0], self.entries[1] + 1))
        keys, values = generator.permutation(KEYS)[:count], generator.integers(0, VALUES, count)
        tokens[generator.permutation(self.context)[:count]] = ENTRY + keys * VALUES + values
        asked = generator.integers(0, count, self.questions)
        starts = self.context + QUESTION * np.arange(self.questions)
        tokens[starts], tokens[starts + 1], tokens[starts + 2] = ASK, KEY + keys[asked], VALUE + values[asked]
        labels[starts + 1] = VALUE + values[asked]
        return tokens, labels

    def read(self, row: int, runs: Sequence[Run]) -> tuple[Int64Array, Int64Array]:
        """Tokens and labels of the runs."""
        tokens, labels = self.row(row)
        index = np.concatenate([np.empty(0, np.int64), *(np.arange(*run) for run in runs)])
        return tokens[index], labels[index]


def stages(length: int) -> list[Entries]:
    """Rows that grow to ``length``: a short row shows the same thing for a fraction of the cost."""
    lengths = [length >> i for i in range(length.bit_length()) if length >> i >= 32][::-1]
    return [Entries(n, n // 16, (1, min(n // 8, KEYS - 4))) for n in lengths]


@dataclass(frozen=True)
class Learned:
    """What training came to.

    Args:
        steps: of the optimizer.
        loss: mean of the last steps, nats per answer.
        finished: whether the longest rows were learned before the steps were over.
    """

    steps: int
    loss: float
    finished: bool


def train_retrieval(
    path: Path, overrides: Sequence[str], folder: Path, launch: Launch, advance: Callable[[str], None] = lambda _: None
) -> Learned:
    """Train the model of a config with its ``train`` section, and write it.

    Of softmax layers alone it becomes a Hugging Face folder, else the checkpoint of a run, without a tokenizer. A stage
    is over when the loss of 25 steps falls below :data:`ENOUGH`; training ends after the last, or with ``train.steps``.
    The data section is not read.

    Raises:
        ConfigError: a fault in the config, or a vocabulary of another size.
        DataError: the folder holds other files.
    """
    config = load_config(path, overrides)
    _check(path, config)
    with joined_world(config.runtime, SequenceSection(length=1, degree=1), launch) as mesh:
        model_config = config.model.model_copy(
            update={"max_position_embeddings": config.model.max_position_embeddings or config.sequence.length}
        )
        check_target(folder, overwrite=True, content=CONTENT if _exports(model_config) else _CHECKPOINTS)
        model = CausalLM(model_config, seed=config.train.seed)
        grown = stages(config.sequence.length)
        trainer = Trainer(config, model_config, mesh, build_engine(config, model, mesh), grown[0])
        learned = _train(trainer, grown, advance)
        _write(trainer, folder)
    return learned


def _check(path: Path, config: Config) -> None:
    """Raises ConfigError as :func:`train_retrieval` says."""
    if config.engine.kind != "torch" or config.sequence.degree > 1:
        raise ConfigError(f"{path}: one process trains this; set engine.kind to torch and sequence.degree to 1")
    if config.model.vocab_size != VOCAB:
        raise ConfigError(f"{path}: model.vocab_size is {config.model.vocab_size}; the task has {VOCAB} tokens")
    for part in ("from_hf", "from_run", "recurrence", "block", "proposals", "sink_tokens"):
        if getattr(config.model, part):
            raise ConfigError(f"{path}: model.{part} has no place in this training; leave it out")


def _exports(config: Model) -> bool:
    return set(config.mixers) == {"softmax"} and not config.kv_bias


def _write(trainer: Trainer, folder: Path) -> None:
    """In place of what an earlier training wrote there."""
    if _exports(trainer.model):
        save_hf(cast(CausalLM, trainer.engine.module), trainer.model, folder, overwrite=True)
        return
    with new_folder(folder, overwrite=True, content=_CHECKPOINTS) as partial:
        state = {**asdict(trainer.progress), "corpora": []}
        save_checkpoint(partial, trainer.engine, trainer.mesh, trainer.model, state, None)


ENOUGH = 0.03
"""Loss at which rows of a length are learned."""
_LAST = 25


def _train(trainer: Trainer, grown: Sequence[Entries], advance: Callable[[str], None]) -> Learned:
    finished = 0
    for rows in grown:
        stage, losses = _with_rows(trainer, rows), deque([float("inf")], maxlen=_LAST)
        trainer.engine.module.train()
        while trainer.progress.step < trainer.config.train.steps:
            losses.append(stage.step()["loss"])
            if trainer.progress.step % _LAST == 0:
                advance(f"step {trainer.progress.step}, rows of {rows.length}: loss {losses[-1]:.3f}")
            if len(losses) == _LAST and sum(losses) / _LAST < ENOUGH:
                finished += 1
                break
    return Learned(trainer.progress.step, sum(losses) / len(losses), finished == len(grown))


def _with_rows(trainer: Trainer, rows: Entries) -> Trainer:
    """The same training with rows of another length."""
    sequence = trainer.config.sequence.model_copy(update={"length": rows.length})
    return replace(trainer, config=trainer.config.model_copy(update={"sequence": sequence}), rows=rows)
