"""``longctx bench attention``: what is measured and planned, and what it says about bad input."""

import json
from pathlib import Path

import pytest

from longctx.bench.attention import bench, contenders, table
from longctx.bench.live_bytes import LiveBytes
from longctx.bench.problem import DEEPSPEED, PACKED, Shape
from longctx.bench.simulate import simulate
from longctx.cli.main import main
from longctx.errors import UnsupportedError

SMALL = Shape(length=256, heads=4, kv_heads=2, head_dim=8)


def test_simulation_needs_no_tensor_and_balances() -> None:
    with LiveBytes() as live:
        rows = list(simulate(Shape(), 64, 8))
    assert live.peak == 0
    found = {(r.ranks, r.documents, r.layout, r.scheme): r for r in rows}
    assert {r.ranks for r in rows} == {8, 16, 32, 64}
    ring = found[8, "one", "zigzag", "ring"]
    # Seven hops with the keys and values forward and back in bf16, and their gradients in fp32; 2,048 tokens a rank, of
    # which half stay on the first. The last rank passes on that half's gradients but never its keys: they stop there.
    assert ring.bytes == 2 * 2 * 64 * (7 * 2048 * (2 + 2) + 6.5 * 2048 * 4)
    assert (ring.hops, ring.crossing, ring.balance) == (7, 0, 1.0)
    assert found[8, "one", "contiguous", "ring"].balance == pytest.approx(15 / 8, rel=1e-3)
    assert found[8, "packed", "balanced", "ring"].balance <= 1.05
    # The README's figures: what others need of packed documents, and seven whole blocks.
    megabytes = found[8, "packed", "balanced", "ring"].bytes / 1e6, 7 * 2048 * 2 * 2 * 64 * 8 / 1e6
    assert [round(size, 1) for size in megabytes] == [18.8, 29.4]
    # Only the block that starts the second turn leaves its node, twice in the forward-backward, and its gradient.
    double = found[16, "one", "zigzag", "double_ring"]
    assert double.bytes == found[16, "one", "zigzag", "ring"].bytes == 2 * 2 * 64 * 1024 * (15 * 4 + 14.5 * 4)
    assert double.crossing < ring.bytes / 4


def test_a_thousand_ranks_are_planned_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["bench", "attention", "--simulate", "1024", "--length", "64k", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {row["ranks"] for row in rows} == {8, 16, 32, 64, 128, 256, 512, 1024}
    assert "| 1024 | packed | balanced | double_ring |" in capsys.readouterr().out


@pytest.mark.tier2
def test_every_contender_is_measured_in_turns() -> None:
    asked: list[str] = []
    report = bench(SMALL, 2, 2, 2, advance=asked.append)
    names = contenders(2, 2, SMALL)
    assert [row.contender for row in report.rows] == names
    assert asked == ["single", *names] * 2
    assert {row.contender for row in report.rows} == {"ring", "ulysses", "allgather", PACKED, DEEPSPEED}
    for row in report.rows:
        assert row.spread[0] <= row.efficiency_vs_single <= row.spread[1]
        assert (row.ratio_vs_deepspeed_ulysses is None) == (row.contender == PACKED)
        assert (row.time_per_pair_vs_ring is not None) == (row.contender == PACKED)
    assert len(table(report)) == 4 + len(names)


def test_what_cannot_be_measured_is_left_out_or_refused() -> None:
    assert DEEPSPEED not in contenders(2, 2, Shape(length=257))
    assert DEEPSPEED not in contenders(4, 4, Shape(kv_heads=2))
    assert {"hybrid", "double_ring"} <= set(contenders(4, 2, SMALL))
    for ranks, inner in ((1, 1), (4, 3)):
        with pytest.raises(UnsupportedError, match=f"{ranks} ranks in groups of {inner}"):
            bench(SMALL, ranks, 1, inner)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--ranks", "1"], "--ranks must be at least 2"),
        (["--length", "many"], "--length"),
        (["--heads", "5"], "--heads 5 is not a multiple of --kv-heads 2"),
        (
            ["--schemes", "spiral"],
            "cannot measure spiral on 2 ranks; choose from ring, ulysses, allgather, packed, deep",
        ),
        (["--simulate", "4"], "--simulate must be at least 8"),
        (["--json", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_packed_documents_fill_the_row_and_average_a_sixteenth() -> None:
    counts = []
    for seed in range(50):
        (starts,) = Shape(seed=seed).packed()
        assert starts[0] == 0 and list(starts) == sorted(set(starts)) and starts[-1] < 16384
        counts.append(len(starts))
    assert 12 < sum(counts) / len(counts) < 21
