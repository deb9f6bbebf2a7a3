"""Killing a rank in the middle of training and proving that nothing was lost."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from longctx.demo.commands import DemoFailed
from longctx.report.metrics import Record, read_records

POLL_S = 0.05


@dataclass(frozen=True)
class Repeated:
    """Losses of the steps that were run twice: before the kill and after the resume."""

    steps: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def equal(self) -> bool:
        """Whether every repeated loss equals the first one, digit for digit."""
        return self.before == self.after


def kill_rank(process: "subprocess.Popen[bytes]", metrics: Path, after_step: int, rank: int, log: Path) -> int:
    """Wait until ``after_step`` was logged, SIGKILL one rank, and return the last step logged by then.

    Raises:
        DemoFailed: training ended before it got there.
    """
    while process.poll() is None:
        records = read_records(metrics) if metrics.exists() else []
        steps = [record["step"] for record in records if record["kind"] == "train"]
        if steps and max(steps) >= after_step:
            pids = next(record["pids"] for record in reversed(records) if "pids" in record)
            os.kill(pids[rank], signal.SIGKILL)
            return int(max(steps))
        time.sleep(POLL_S)
    raise DemoFailed(f"training ended with status {process.returncode} before step {after_step}; see {log}")


def repeated_steps(metrics: Path) -> Repeated:
    """Compare what was logged for the same step before and after the (one) resume.

    Raises:
        DemoFailed: the run was never resumed, or no step was repeated.
    """
    records = read_records(metrics)
    resumes = [i for i, record in enumerate(records) if record.get("event") == "resume"]
    if not resumes:
        raise DemoFailed(f"{metrics} shows no resume after the kill")
    first = _losses(records[: resumes[0]])
    second = _losses(records[resumes[0] :])
    steps = tuple(sorted(first.keys() & second.keys()))
    if not steps:
        raise DemoFailed(f"{metrics} shows no step that was run both before the kill and after the resume")
    return Repeated(steps, tuple(first[s] for s in steps), tuple(second[s] for s in steps))


def _losses(records: list[Record]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
