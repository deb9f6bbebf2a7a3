"""metrics.jsonl and the progress line, written by the first rank."""

import json
from pathlib import Path

from longctx.report.terminal import step_line
from longctx.train.trainer import Callback, Record, Trainer, TrainingFailed, process_ids


class MetricsFile(Callback):
    """Appends every record to ``metrics.jsonl``, one JSON object per line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_start(self, trainer: Trainer) -> None:
        pids = process_ids(trainer.mesh)
        if trainer.mesh.is_first:
            self._end_torn_line()
        trainer.event("resume" if trainer.progress.step else "start", pids=pids, degree=trainer.mesh.sequence.size)

    def on_record(self, trainer: Trainer, record: Record) -> None:
        if not trainer.mesh.is_first:
            return
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            # The other ranks see this one leave; a collective per record would cost more than their worse message.
            raise TrainingFailed(f"cannot write {self._path}: {error.strerror}; free space and resume") from error

    def on_end(self, trainer: Trainer) -> None:
        trainer.event("end", tokens=trainer.progress.tokens)

    def _end_torn_line(self) -> None:
        """A killed process may have left half a line; the next record starts a line of its own."""
        if self._path.exists() and self._path.stat().st_size:
            with self._path.open("rb+") as file:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")


class StepLine(Callback):
    """Prints one line per record."""

    def on_record(self, trainer: Trainer, record: Record) -> None:
        if not trainer.mesh.is_first:
            return
        if record["kind"] == "train":
            print(step_line(record, trainer.config.train.steps), flush=True)
        elif record["kind"] == "valid":
            print(
                f"step {record['step']} | held-out loss {record['loss']:.4f} over {record['tokens']:,} tokens",
                flush=True,
            )
        elif record["event"] == "attention":
            print(f"attention moves by {record['scheme']}: {record['reason']}", flush=True)
        elif record["event"] in ("checkpoint", "resume"):
            print(f"step {record['step']} | {record['event']} {record.get('path', '')}".rstrip(), flush=True)
