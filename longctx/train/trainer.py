"""The training step and the loop around it; everything else is a callback."""

import math
import os
import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from longctx.attention.choice import Choice, choose_scheme
from longctx.attention.traffic import Call
from longctx.config.schema import Config, Model
from longctx.errors import LongctxError
from longctx.mixers.statistics import Observed, merged
from longctx.model.decoder import Output
from longctx.recurrence.segments import layout_maker, with_resets
from longctx.runtime.mesh import Mesh
from longctx.sequence.context import SequenceContext
from longctx.sequence.layout import Documents
from longctx.train.ahead import Ahead
from longctx.train.batches import MicroBatch, RowSource, read_micro_batches, step_rows
from longctx.train.engine import Engine
from longctx.train.flops import flops_per_token, peak_flops
from longctx.train.observed import absorb, over_ranks
from longctx.train.schedule import learning_rate

Record = dict[str, Any]


class TrainingFailed(LongctxError):
    """The run cannot go on."""


@dataclass
class Progress:
    """How far the run is; all of it is in every checkpoint."""

    step: int = 0
    tokens: int = 0
    nonfinite: int = 0


class Totals(NamedTuple):
    """Of one step over all ranks: labels, those of proposal heads, tokens, and the data hash."""

    labels: int
    proposal_labels: int
    tokens: int
    data_hash: int


class Sums(NamedTuple):
    """Of one step over all ranks: token losses, losses of proposal heads, and what was observed."""

    loss: float
    proposal_loss: float
    observed: Observed | None


class Callback:
    """Hooks around the loop; each is called on every rank, in the order the callbacks were given."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def on_record(self, trainer: "Trainer", record: Record) -> None:
        """A record to log; the same on every rank."""

    def on_step(self, trainer: "Trainer") -> None:
        """After each optimizer step."""

    def on_end(self, trainer: "Trainer") -> None: ...


@dataclass
class Trainer:
    """Runs optimizer steps until ``config.train.steps``.

    The loss of a step is the sum of token losses over all micro-batches and ranks divided by the count of labels over
    all micro-batches and ranks, known before the first backward. What mixers want optimised beside it is divided by
    the count of tokens, enters the gradient and the field ``auxiliary_loss`` of the record, not its ``loss``. So does
    the loss of proposal heads, divided by the count of their own labels, as ``proposal_loss``.
    """

    config: Config
    model: Model
    mesh: Mesh
    engine: Engine
    rows: RowSource
    callbacks: Sequence[Callback] = ()
    progress: Progress = field(default_factory=Progress)

    def context(self, documents: Documents) -> SequenceContext:
        """What layers are told about rows with these documents."""
        return self._context(documents, self.attention.scheme)

    @cached_property
    def attention(self) -> Choice:
        """How attention moves over the ranks: as the config says, or chosen once for a whole row of one document."""
        scheme = self.config.sequence.scheme
        if scheme != "auto":
            return Choice(scheme, {}, "sequence.scheme says so")
        model, dtype = self.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[self.config.train.precision]
        context = self._context(((0,),) * self.config.train.micro_batch, "ring")
        return choose_scheme(
            context, Call(model.num_heads, model.kv_heads, model.head_size, dtype), self.mesh.device.type
        )

    @cached_property
    def ahead(self) -> Ahead | None:
        """How rows train proposal heads; None: there are none."""
        proposals = self.model.proposals
        return None if proposals is None else Ahead(proposals, self.config.train.seed)

    def _context(self, documents: Documents, scheme: str) -> SequenceContext:
        sequence, group, recurrence = self.config.sequence, self.mesh.sequence, self.model.recurrence
        if recurrence is not None and (carried := recurrence.carried(self.progress.step)):
            documents = with_resets(documents, carried * recurrence.segment, sequence.length)
        cut = layout_maker(sequence.layout, recurrence)
        return SequenceContext(group, cut(sequence.length, group.size, documents), documents, scheme=scheme)

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingFailed: more than ``train.max_nonfinite`` updates were skipped.
        """
        for callback in self.callbacks:
            callback.on_start(self)
        if self.config.sequence.scheme == "auto":
            self.event("attention", scheme=self.attention.scheme, reason=self.attention.reason)
        self.engine.module.train()
        while self.progress.step < self.config.train.steps:
            record = self.step()
            if self.progress.step % self.config.train.log_every == 0 or record["skipped"]:
                self.log(record)
            if self.progress.nonfinite > self.config.train.max_nonfinite:
                raise TrainingFailed(
                    f"step {self.progress.step}: {self.progress.nonfinite} updates were skipped for a non-finite loss "
                    f"or gradient norm, more than train.max_nonfinite = {self.config.train.max_nonfinite}; "
                    "lower train.lr or inspect the data, then resume from the last checkpoint"
                )
            for callback in self.callbacks:
                callback.on_step(self)
        for callback in self.callbacks:
            callback.on_end(self)

    def log(self, record: Record) -> None:
        """Hand a record to every callback."""
        for callback in self.callbacks:
            callback.on_record(self, record)

    def event(self, name: str, **details: Any) -> None:
        """Log something that happened."""
        self.log({"kind": "event", "step": self.progress.step, "event": name, "time": time.time(), **details})

    def step(self) -> Record:
        """One optimizer step; returns its record, equal on every rank."""
        started = time.perf_counter()
        train = self.config.train
        micro_batches = self._read(step_rows(self.progress.step, train.batch, self.mesh))
        totals = self._totals(micro_batches)
        loss, proposal_loss, observed = self._accumulate(micro_batches, totals)
        lr = learning_rate(train, self.progress.step + 1)
        update = self.engine.step(lr, hold=not math.isfinite(loss + proposal_loss))
        if observed is not None and update.applied:
            absorb(self.engine.module, observed)
        self.progress.step += 1
        self.progress.tokens += totals.tokens
        self.progress.nonfinite += not update.applied
        seconds = time.perf_counter() - started
        record = self._record(loss, update.grad_norm, not update.applied, lr, totals.data_hash, seconds)
        if self.ahead is not None:
            record["proposal_loss"] = finite(proposal_loss)
        if observed is not None:
            record["auxiliary_loss"] = finite(float(observed.loss_sum) / totals.tokens)
        return record

    @torch.no_grad()
    def evaluate(self, rows: RowSource, count: int) -> tuple[float, int]:
        """Mean token loss over the first ``count`` rows of another source, and the number of labels it is over."""
        self.engine.module.eval()
        share = range(self.mesh.data.rank, count, self.mesh.data.size)
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        # Every rank enters the model equally often, or ZeRO-3's parameter gathering would hang.
        for turn in range(-(-count // self.mesh.data.size)):
            row = share[turn] if turn < len(share) else 0
            (batch,) = read_micro_batches(rows, range(row, row + 1), 1, self.context)
            loss_sum = self._forward(batch).loss_sum
            assert loss_sum is not None
            if turn < len(share):
                total[0] += loss_sum
                total[1] += batch.labels
        self.engine.module.train()
        self.mesh.all_reduce(total)
        return float(total[0] / total[1]), int(total[1])

    def _read(self, rows: range) -> list[MicroBatch]:
        targets_of = None if self.ahead is None else self.ahead.targets
        return read_micro_batches(self.rows, rows, self.config.train.micro_batch, self.context, targets_of)

    def _totals(self, micro_batches: Iterable[MicroBatch]) -> Totals:
        counts = [
            [b.labels, 0 if b.targets is None else b.targets.count, b.tokens_BT.numel(), b.data_hash]
            for b in micro_batches
        ]
        sums = torch.tensor(counts, dtype=torch.int64).sum(0)
        labels, further, tokens, digest = self.mesh.all_reduce(sums.to(self.mesh.device)).tolist()
        return Totals(max(int(labels), 1), max(int(further), 1), int(tokens), int(digest))

    def _accumulate(self, micro_batches: Sequence[MicroBatch], totals: Totals) -> Sums:
        """Backward through every micro-batch; mean losses of the whole step, and what all ranks observed in it."""
        total = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        observed: Observed | None = None
        for index, batch in enumerate(micro_batches):
            output = self._forward(batch)
            assert output.loss_sum is not None
            # Engines average over the world; the sum over ranks is what is wanted.
            loss = output.loss_sum * (self.mesh.world.size / totals.labels)
            if output.observed is not None:
                loss = loss + output.observed.loss_sum * (self.mesh.world.size / totals.tokens)
                observed = merged((observed, output.observed.detached()))
            if output.proposal_loss_sum is not None:
                loss = loss + output.proposal_loss_sum * (self.mesh.world.size / totals.proposal_labels)
                total[1] += output.proposal_loss_sum.detach()
            self.engine.backward(loss, last=index == len(micro_batches) - 1)
            total[0] += output.loss_sum.detach()  # read once, at the end: reading waits for the device
        loss_sum, proposal_loss_sum = self.mesh.all_reduce(total).tolist()
        observed = None if observed is None else over_ranks(observed, self.mesh)
        return Sums(loss_sum / totals.labels, proposal_loss_sum / totals.proposal_labels, observed)

    def _forward(self, batch: MicroBatch) -> Output:
        device = self.mesh.device
        tokens_BT, labels_BT = batch.tokens_BT.to(device), batch.labels_BT.to(device)
        targets = None if batch.targets is None else batch.targets.to(device)
        return self.engine.forward(tokens_BT, batch.context, labels_BT, self.config.train.loss_chunk, targets)

    def _record(
        self, loss: float, grad_norm: float | None, skipped: bool, lr: float, data_hash: int, seconds: float
    ) -> Record:
        # All ranks report the slowest one's time and the fullest one's memory.
        measured = torch.tensor([seconds, peak_memory(self.mesh.device)], dtype=torch.float64)
        measured = self.mesh.all_reduce(measured.to(self.mesh.device), dist.ReduceOp.MAX)
        seconds, memory = float(measured[0]), int(measured[1])
        rate = self.config.train.batch * self.config.sequence.length / seconds
        return {
            "kind": "train", "step": self.progress.step, "loss": finite(loss), "grad_norm": finite(grad_norm), "lr": lr,
            "tokens": self.progress.tokens, "tokens_per_second": rate, "mfu": self._mfu(rate), "peak_memory": memory,
            "seconds": seconds, "eta": seconds * (self.config.train.steps - self.progress.step), "data_hash": data_hash,
            "skipped": skipped, "time": time.time(),
        }  # fmt: skip

    def _mfu(self, tokens_per_second: float) -> float | None:
        name = torch.cuda.get_device_name(self.mesh.device) if self.mesh.device.type == "cuda" else None
        peak = peak_flops(name, self.config.train.precision)
        # What an architecture that transformers computes multiplies per token is not known (experts, for one), and of
        # a Block Transformer it is not counted: most of its weights multiply once per block. Nor is it beside proposal
        # heads: not all of them run, and a frozen decoder has no backward.
        model = self.model
        if peak is None or model.hf_config is not None or model.block is not None or model.proposals is not None:
            return None
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        needed = flops_per_token(self.model, parameters, self.config.sequence.length)
        return needed * tokens_per_second / (peak * self.mesh.world.size)


def finite(number: float | None) -> float | None:
    """JSON knows no infinity."""
    return number if number is not None and math.isfinite(number) else None


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_ids(mesh: Mesh) -> list[int]:
    """Process id of every rank."""
    return mesh.gather(os.getpid())
