"""Reading metrics.jsonl as runs really leave it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import LongctxError
from longctx.report.metrics import Interruption, Metrics, read_metrics, read_records, to_metrics


def train(step: int, loss: float, **more: Any) -> str:
    return json.dumps({"kind": "train", "step": step, "loss": loss, **more})


def event(step: int, name: str, **more: Any) -> str:
    return json.dumps({"kind": "event", "step": step, "event": name, **more})


def parse_metrics(lines: list[str]) -> Metrics:
    return to_metrics([json.loads(line) for line in lines])


def test_truncated_last_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes((train(1, 5.0) + "\n" + train(2, 4.0) + "\n" + train(3, 3.0)[:-7]).encode())
    metrics = read_metrics(file)
    assert metrics.series("loss") == ([1, 2], [5.0, 4.0])
    assert read_records(file) == [json.loads(train(step, loss)) for step, loss in ((1, 5.0), (2, 4.0))]


def test_line_torn_inside_a_character_does_not_lose_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(train(1, 5.0).encode() + b'\n{"kind":"event","note":"\xc3')
    assert read_metrics(file).series("loss") == ([1], [5.0])


def test_a_line_torn_before_a_resume_is_dropped(tmp_path: Path) -> None:
    """The writer ends a torn line before it goes on, so only the half record is lost."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([train(1, 5.0), train(2, 4.0)[:20], event(1, "resume"), train(2, 4.5)]))
    metrics = read_metrics(file)
    assert metrics.series("loss") == ([1, 2], [5.0, 4.5])
    assert [record["event"] for record in metrics.events] == ["resume"]


def test_later_writing_of_a_repeated_step_wins_and_events_are_kept() -> None:
    lines = [event(0, "start"), *(train(step, step / 10) for step in range(1, 8)), event(4, "resume")]
    lines += [train(step, 10.0 + step) for step in range(5, 10)] + [event(9, "end")]
    metrics = parse_metrics(lines)
    assert metrics.series("loss") == (list(range(1, 10)), [0.1, 0.2, 0.3, 0.4, 15.0, 16.0, 17.0, 18.0, 19.0])
    assert [record["event"] for record in metrics.events] == ["start", "resume", "end"]
    assert metrics.interruptions == (Interruption(stopped=7, resumed=4),)


def test_run_started_again_from_nothing_is_an_interruption_too() -> None:
    lines = [event(0, "start"), train(1, 1.0), train(2, 1.0), event(0, "start"), train(1, 1.0)]
    assert parse_metrics(lines).interruptions == (Interruption(stopped=2, resumed=0),)


def test_repeated_validation_step_counts_once() -> None:
    lines = [train(1, 1.0), '{"kind":"valid","step":10,"loss":3.0}', '{"kind":"valid","step":10,"loss":2.0}']
    assert parse_metrics(lines).series("loss", "valid") == ([10], [2.0])


def test_seconds_leave_out_the_pause_between_stop_and_resume() -> None:
    lines = [event(0, "start"), train(1, 1.0, time=100.0, seconds=2.0), train(2, 1.0, time=105.0, seconds=5.0)]
    lines += [event(1, "resume"), train(2, 1.0, time=900.0, seconds=4.0), train(3, 1.0, time=906.0, seconds=6.0)]
    assert parse_metrics(lines).seconds == (105.0 - 100.0 + 2.0) + (906.0 - 900.0 + 4.0)


def test_series_skips_null_and_median_skips_what_is_not_finite() -> None:
    lines = [train(1, math.nan, mfu=None), train(2, 3.0, mfu=0.5), train(3, 1.0, mfu=None), train(4, 2.0)]
    metrics = parse_metrics(lines)
    assert metrics.series("mfu") == ([2], [0.5])
    assert metrics.median("loss") == 2.0
    assert metrics.median("absent") is None
    assert math.isnan(metrics.series("loss")[1][0])


def test_newest_event_value() -> None:
    metrics = parse_metrics([event(0, "start", pids=[1, 2]), event(5, "resume", pids=[3]), event(6, "checkpoint")])
    assert metrics.latest_event("pids") == [3]
    assert metrics.latest_event("absent") is None


@pytest.mark.parametrize("content", ["", "\n\n", "no json\n", '{"kind":"event","step":0,"event":"start"}\n', "[1]\n"])
def test_metrics_without_a_training_step_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(content)
    with pytest.raises(LongctxError, match="holds no training step yet"):
        read_metrics(file)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongctxError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")
