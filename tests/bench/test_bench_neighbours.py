"""``longctx bench neighbours``: recall against brute force, and the share of the softmax that is attended to."""

import json
from pathlib import Path

import pytest

pytest.importorskip("faiss", reason="the extra neighbours is not installed")

from longctx.bench.neighbours import Found, neighbours
from longctx.cli.main import main


def test_the_command_prints_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below 1,024 keys nothing is indexed, and all of the softmax is attended to."""
    file = tmp_path / "found.json"
    words = ["bench", "neighbours", "--lengths", "500,2000", "--count", "32", "--rounds", "1", "--json", str(file)]
    assert main(words) == 0
    rows = [Found(**row) for row in json.loads(file.read_text())]
    assert [row.length for row in rows] == [500, 2000]
    assert rows[0].mass == pytest.approx(1, abs=1e-5)
    assert 0.3 < rows[1].mass <= 1 + 1e-5
    assert all(0 < row.recall <= 1 and row.build_s > 0 and row.step_s > 0 and row.dense_s > 0 for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith(f"| 2,000 | 32 | {rows[1].recall:.3f} | {rows[1].mass:.3f} |")


def test_all_keys_are_all_of_the_softmax() -> None:
    (row,) = neighbours([1500], 1500, 1)
    assert row.recall == 1
    assert row.mass == pytest.approx(1, abs=1e-5)


def test_numbers_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "neighbours", "--lengths", "1"]) == 2
    assert "--lengths must be at least 2" in capsys.readouterr().err
