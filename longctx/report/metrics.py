"""Reads metrics.jsonl as runs really leave it: lines torn by a kill, steps repeated after a resume."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from longctx.errors import LongctxError

Record = dict[str, Any]


@dataclass(frozen=True)
class Interruption:
    """A run that stopped after ``stopped`` and went on from the checkpoint of step ``resumed`` (0: from the start)."""

    stopped: int
    resumed: int


@dataclass(frozen=True)
class Metrics:
    """The records of one run: ``train`` and ``valid`` in ascending step order, each step once, the last writing of it.

    ``events`` keep the order of the file. ``seconds`` is the wall time all processes of the run spent between their
    first and last logged step, repeated steps included, idle time between a stop and a resume excluded.
    """

    train: tuple[Record, ...]
    valid: tuple[Record, ...]
    events: tuple[Record, ...]
    interruptions: tuple[Interruption, ...]
    seconds: float

    def series(self, field: str, kind: str = "train") -> tuple[list[int], list[float]]:
        """Steps and values of one numeric field, in step order; records where it is missing or null are left out."""
        records = self.train if kind == "train" else self.valid
        known = [record for record in records if _is_number(record.get(field))]
        return [record["step"] for record in known], [float(record[field]) for record in known]

    def median(self, field: str) -> float | None:
        """Median of the finite values of a training field, or None if there is none."""
        finite = [value for value in self.series(field)[1] if math.isfinite(value)]
        return median(finite) if finite else None

    def latest_event(self, field: str) -> Any:
        """The newest value any event gives for ``field``, or None."""
        return next((event[field] for event in reversed(self.events) if field in event), None)


def read_metrics(path: Path) -> Metrics:
    """Read a run's metrics.jsonl.

    Raises:
        LongctxError: the file does not exist, or holds no training step.
    """
    metrics = to_metrics(read_records(path))
    if not metrics.train:
        raise LongctxError(f"{path} holds no training step yet: let the run log at least one step, then report again")
    return metrics


def read_records(path: Path) -> list[Record]:
    """Every whole record of a metrics.jsonl in the order of the file; lines cut off by a kill are left out.

    Raises:
        LongctxError: the file does not exist or cannot be read.
    """
    try:
        # A kill can tear a line inside a multi-byte character; such a line is torn, not a reason to give up.
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise LongctxError(f"{path} does not exist: no training has logged a step to this run folder yet") from None
    except OSError as error:
        raise LongctxError(f"{path} cannot be read: {error.strerror}") from None
    return [record for record in map(_parse, text.splitlines()) if record is not None]


def to_metrics(records: list[Record]) -> Metrics:
    """Metrics from the records of a metrics.jsonl; see :class:`Metrics` for the rules."""
    return Metrics(
        train=_last_writing(records, "train"),
        valid=_last_writing(records, "valid"),
        events=tuple(record for record in records if record["kind"] == "event"),
        interruptions=tuple(_interruptions(records)),
        seconds=sum(_seconds(session) for session in _sessions(records)),
    )


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    usable = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if usable else None


def _last_writing(records: list[Record], kind: str) -> tuple[Record, ...]:
    by_step = {record["step"]: record for record in records if record["kind"] == kind}
    return tuple(by_step[step] for step in sorted(by_step))


def _interruptions(records: list[Record]) -> Iterator[Interruption]:
    stopped = 0
    for record in records:
        if record["kind"] == "train":
            stopped = record["step"]
        elif _begins(record) and stopped:
            yield Interruption(stopped, record["step"])


def _sessions(records: list[Record]) -> Iterator[list[Record]]:
    """Training records grouped by the process that wrote them."""
    session: list[Record] = []
    for record in records:
        if _begins(record):
            yield session
            session = []
        elif record["kind"] == "train":
            session.append(record)
    yield session


def _begins(record: Record) -> bool:
    return record["kind"] == "event" and record.get("event") in ("start", "resume")


def _seconds(session: list[Record]) -> float:
    timed = [record for record in session if _is_number(record.get("time")) and _is_number(record.get("seconds"))]
    return float(timed[-1]["time"] - timed[0]["time"] + timed[0]["seconds"]) if timed else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
