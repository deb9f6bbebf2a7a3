"""``longctx bench mixers`` and ``handoff``: what they find on a small scale, and what they say about bad input."""

import json
from pathlib import Path

import pytest

from longctx.attention import cutting
from longctx.bench.mixers import growth, slope, table
from longctx.bench.training import DECODERS
from longctx.cli.main import main
from longctx.mixers import MIXERS


def test_slope_is_the_exponent() -> None:
    assert slope((1, 2, 4, 8), [3.0 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_memory_of_every_mechanism_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are counted, not timed; softmax's too, whose kernel keeps no scores."""
    # So that even the shortest length has calls of attention as long as they get.
    monkeypatch.setattr(cutting, "SPAN", 256)
    found = growth((1024, 2048, 4096), rounds=1)
    assert [row.mixer for row in found] == [*MIXERS, *DECODERS]
    for row in found:
        assert row.memory_slope == pytest.approx(1, abs=0.15), row.mixer
    assert len(table(found)) == 2 + len(found)


def test_growth_is_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "growth.json", tmp_path / "growth.png"]
    arguments = ["--lengths", "256,512", "--rounds", "1", "--mixers", "conv", "--json", files[0], "--plot", files[1]]
    assert main(["bench", "mixers", *map(str, arguments)]) == 0
    (row,) = json.loads(files[0].read_text())
    assert (row["mixer"], row["lengths"]) == ("conv", [256, 512])
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "| conv |" in capsys.readouterr().out


@pytest.mark.tier2
def test_ranks_are_measured_against_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "efficiency.json"
    arguments = ["--ranks", "2", "--length", "128", "--rounds", "2", "--mixers", "conv,ttt", "--json", str(file)]
    assert main(["bench", "mixers", *arguments]) == 0
    rows = json.loads(file.read_text())
    assert [row["mixer"] for row in rows] == ["conv", "ttt/1", "ttt/8"]
    assert [row["bubble"] for row in rows] == [None, 0.5, pytest.approx(8 / 9)]
    assert all(0 < row["lowest"] <= row["median"] <= row["highest"] for row in rows)
    assert "efficiency of 2 ranks against one process of 2 threads, 128 tokens" in capsys.readouterr().out


@pytest.mark.tier2
def test_waiting_is_measured_beside_its_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bubble.json"
    assert main(["bench", "handoff", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["planned"] for row in rows] == [pytest.approx(1 / (row["pieces"] + 1)) for row in rows]
    assert all(row["measured"] < 1 for row in rows)
    assert f"| 1 | 0.50 | {rows[0]['measured']:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["mixers", "--ranks", "2", "--lengths", "64,128"], "--lengths has no effect with --ranks"),
        (["mixers", "--length", "64"], "--length has no effect without --ranks"),
        (["mixers", "--mixers", "spiral"], "--mixers spiral is unknown; choose from"),
        (["mixers", "--lengths", "512"], "--lengths needs at least two"),
        (["mixers", "--plot", "/nowhere/at/all.png"], "--plot /nowhere/at/all.png cannot be written"),
        (["recall", "--kinds", "lstm"], "--kinds lstm is unknown; choose from none, rmt, armt"),
        (["recall", "--segments", "0"], "--segments must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
