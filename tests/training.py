"""Small training runs for the tests of the laws: random rows, a tiny decoder, any mesh, any engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longctx.config.schema import Config, Model
from longctx.mixers.statistics import statistics_of
from longctx.model.block_transformer import build_native
from longctx.model.proposals import with_proposals
from longctx.recurrence import with_recurrence
from longctx.runtime.mesh import build_mesh
from longctx.sequence.layout import Run
from longctx.train.optimizer import MOMENTS
from longctx.train.setup import build_engine
from longctx.train.trainer import Callback, Record, Trainer

IGNORED = -100


@dataclass(frozen=True)
class RandomRows:
    """Seeded random rows with random documents and randomly masked labels; ``fault`` shifts one label of row 0."""

    length: int
    vocabulary: int
    seed: int
    documents_per_row: int = 3
    fault: bool = False

    def documents(self, row: int) -> tuple[int, ...]:
        generator = np.random.default_rng((self.seed, row, 1))
        extra = generator.integers(0, self.length, self.documents_per_row - 1)
        return tuple(sorted({0, *(int(start) for start in extra)}))

    def whole(self, row: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        generator = np.random.default_rng((self.seed, row, 2))
        tokens = generator.integers(0, self.vocabulary, self.length + 1)
        labels = tokens[1:].copy()
        for start in self.documents(row)[1:]:
            labels[start - 1] = IGNORED
        # Rows differ in how many labels they carry, and some ranks may get none at all.
        labels[generator.random(self.length) < generator.random()] = IGNORED
        if self.fault and row == 0:
            valid = np.flatnonzero(labels != IGNORED)[0]
            labels[valid] = (labels[valid] + 1) % self.vocabulary
        return tokens[:-1], labels

    def read(self, row: int, runs: Sequence[Run]) -> tuple[Any, Any]:
        tokens, labels = self.whole(row)
        index = np.concatenate([np.empty(0, np.int64), *(np.arange(*run) for run in runs)])
        return tokens[index], labels[index]


@dataclass(frozen=True)
class Case:
    """One training run."""

    length: int = 37
    degree: int = 1
    layout: str = "zigzag"
    scheme: str = "ring"
    inner: int | None = None
    engine: dict[str, Any] = field(default_factory=lambda: {"kind": "torch"})
    batch: int = 2
    micro_batch: int = 1
    steps: int = 3
    seed: int = 0
    fp64: bool = True
    fault: bool = False
    recompute: bool = False
    precision: str = "fp32"
    model: dict[str, Any] = field(default_factory=dict)
    clip: float = 0.1
    lr: float = 1e-2
    max_nonfinite: int = 3


@dataclass(frozen=True)
class Result:
    """What a run did, as seen by the first rank."""

    losses: list[float]
    grad_norms: list[float]
    hashes: list[int]
    tokens: int
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    proposal_losses: list[float] = field(default_factory=list)


def model_config(case: Case) -> Model:
    shape = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4}
    if "layers" in case.model:
        del shape["num_layers"]
    return Model(**{**shape, "intermediate_size": 40, "init_std": 0.2, **case.model})


def config_of(case: Case) -> Config:
    return Config.model_validate(
        {
            "run": "unused",
            "data": {"sources": [{"path": "unused"}]},
            "sequence": {"length": case.length, "degree": case.degree, "layout": case.layout, "scheme": case.scheme},
            "train": {
                "steps": case.steps, "batch": case.batch, "micro_batch": case.micro_batch, "lr": case.lr,
                "clip": case.clip, "loss_chunk": 7, "recompute": case.recompute, "precision": case.precision,
                # Adam divides by the gradient's size: a larger eps keeps it from blowing up rounding where that is 0.
                "eps": 1e-4, "schedule": {"warmup": 2}, "max_nonfinite": case.max_nonfinite,
            },
            "engine": case.engine,
        }
    )  # fmt: skip


class Watch(Callback):
    """Collects what a run does."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.events: list[Record] = []

    def on_record(self, trainer: Trainer, record: Record) -> None:
        (self.events if record["kind"] == "event" else self.records).append(record)


def build(case: Case, weights: Callable[[Any], None] | None = None) -> tuple[Trainer, Watch]:
    """A trainer in the current process world; ``weights`` may replace those drawn from the seed, statistics too."""
    config, shape = config_of(case), model_config(case)
    mesh = build_mesh(case.degree, torch.device("cpu"), 60, case.inner)
    model: Any = with_recurrence(build_native(shape, recompute=case.recompute, seed=case.seed), case.seed)
    model = with_proposals(model, case.seed)
    if case.fp64:
        model = model.double()
    if weights is not None:
        with torch.no_grad():
            for tensor in (*model.parameters(), *statistics_of(model).values()):
                tensor.fill_(float("nan"))
        weights(model)
    engine = build_engine(config, model, mesh)
    assert shape.vocab_size is not None
    rows = RandomRows(case.length, shape.vocab_size, case.seed, fault=case.fault)
    watch = Watch()
    return Trainer(config, shape, mesh, engine, rows, [watch]), watch


def train(case: Case) -> Result:
    """Run a case on the current world; collective."""
    trainer, watch = build(case)
    gradients: dict[str, torch.Tensor] = {}
    step = trainer.engine.step

    def step_and_keep(lr: float, hold: bool) -> Any:
        if not gradients:
            gradients.update(full_gradients(trainer.engine.module))
        return step(lr, hold)

    trainer.engine.step = step_and_keep  # type: ignore[method-assign]
    trainer.run()
    return Result(
        [r["loss"] for r in watch.records],
        [r["grad_norm"] for r in watch.records],
        [r["data_hash"] for r in watch.records],
        trainer.progress.tokens,
        gradients,
        full_weights(trainer),
        [r["proposal_loss"] for r in watch.records if "proposal_loss" in r],
    )


def full_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, whatever engine holds it."""
    if not any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in module.parameters()):
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters() if p.requires_grad}


def full_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every parameter at full precision, gathered from the engine's fragments."""
    return _gathered(trainer, "weight")


def full_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, moments and statistics as ``"kind name"``, and the optimizer's count of updates."""
    kinds = ("weight", *MOMENTS)
    state = {f"{kind} {name}": t for kind in kinds for name, t in _gathered(trainer, kind).items()}
    state |= {f"statistic {name}": t.clone() for name, t in statistics_of(trainer.engine.module).items()}
    return state | {"updates": torch.tensor(trainer.engine.updates)}


def _gathered(trainer: Trainer, kind: str) -> dict[str, torch.Tensor]:
    found = {}
    for fragment in trainer.engine.fragments():
        part = fragment.weight if kind == "weight" else fragment.moments.get(kind)
        if part is None:  # a parameter that is not trained
            continue
        whole = torch.zeros(fragment.shape.numel(), dtype=part.dtype)
        if not trainer.engine.replicated or trainer.mesh.is_first:
            whole[fragment.start : fragment.start + fragment.numel] = part
        found[fragment.name] = trainer.mesh.all_reduce(whole).view(fragment.shape).clone()
    return found


def relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-30)


def assert_same_training(found: Result, wanted: Result, tolerance: float) -> None:
    """Losses, norms, gradients and weights agree to ``tolerance`` (relative to the largest entry); the data exactly."""
    assert found.hashes == wanted.hashes
    assert found.tokens == wanted.tokens
    numbers = [r.losses + r.proposal_losses + r.grad_norms for r in (found, wanted)]
    for a, b in zip(*numbers, strict=True):
        assert relative(a, b) < tolerance, (a, b)
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(found, kind), getattr(wanted, kind)
        assert ours.keys() == theirs.keys()
        # Some gradients are 0 but for rounding (one token: its query decides nothing), which follows the larger ones.
        floor = 1e-4 * max(float(t.abs().max()) for t in theirs.values())
        for name in ours:
            scale = max(float(theirs[name].abs().max()), floor, 1e-8)
            error = float((ours[name].double() - theirs[name].double()).abs().max()) / scale
            assert error < tolerance, f"{kind} of {name}: {error:.3e}"
