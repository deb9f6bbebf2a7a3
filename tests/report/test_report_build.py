"""`longctx report` end to end on synthetic runs: files, page, summary, errors."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from longctx.cli.main import main
from longctx.report.build import build_report
from longctx.report.plots import running_median

HOSTILE = "<script>alert(1)</script>\"'&<img src=https://example.org/x.png>"
ALL_FIGURES = {"loss", "throughput", "optimization", "perplexity", "context_gain", "needle"}


def write_run(folder: Path, *, evaluated: bool = True, steps: int = 40) -> Path:
    """A run of ``steps`` steps that was stopped at 30 and resumed from 25."""
    (folder / "eval").mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"kind": "event", "step": 0, "event": "start", "pids": [11, 12]}]
    order = [*range(1, 31), "resume", *range(26, steps + 1)] if steps > 30 else [*range(1, steps + 1)]
    for step in order:
        if step == "resume":
            lines.append({"kind": "event", "step": 25, "event": "resume", "pids": [11, 12]})
            continue
        assert isinstance(step, int)
        lines.append(
            {
                "kind": "train", "step": step, "loss": 8 - step / 10, "grad_norm": 2 / step, "lr": 1e-3 / step,
                "tokens": 1000 * step, "tokens_per_second": 2000.0 + step, "mfu": None, "peak_memory": 10**9 + step,
                "seconds": 0.5, "eta": 1.0, "time": 100 + step / 2, "skipped": step == 3,
            }
        )  # fmt: skip
        if step % 10 == 0:
            lines.append({"kind": "valid", "step": step, "loss": 8.5 - step / 10, "tokens": 100})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(
        f"run: here\nnote: {json.dumps(HOSTILE)}\nsequence: {{length: 4096, degree: 2}}\ntrain: {{steps: 40}}\n"
    )
    if evaluated:
        for task, result in evaluations().items():
            (folder / "eval" / f"{task}.json").write_text(json.dumps({"task": task, **result}))
    return folder


def evaluations() -> dict[str, dict[str, Any]]:
    bins = [{"start": 1 + 2**k // 2, "stop": 1 + 2**k, "count": k, "perplexity": 90.0 / (k + 1)} for k in range(8)]
    curve = [{"context": 2**k, "loss": 4.0 - k / 10} for k in range(4, 8)]
    cells = [
        {"length": length, "depth": depth, "choice_accuracy": 0.5, "greedy_accuracy": 0.25}
        for length in (128, 256) for depth in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    return {
        "perplexity": {
            "bins": bins, "perplexity": 23.456, "tokens": 12345, "bits_per_byte": 1.2345,
            "gain": {"targets": 64, "curve": curve},
        },
        "needle": {"cells": cells, "chance": 0.1, "samples": 60, "samples_per_cell": 10, "choice_accuracy": 0.5},
        "unigram": {"entropy": 6.54321},
    }  # fmt: skip


class _Page(HTMLParser):
    """Collects what a browser would load or run, and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_every_figure_is_a_valid_png_with_content(tmp_path: Path) -> None:
    written = build_report(write_run(tmp_path / "run"))
    assert {path.stem for path in written[:-1]} == ALL_FIGURES
    assert written[-1].name == "index.html"
    for path in written[:-1]:
        pixels = imread(path)
        assert pixels.shape[1] == 1280
        assert pixels.shape[0] > 400
        assert pixels[..., :3].std() > 0.03, f"{path.name} is all but blank"
    assert sorted(path.name for path in (tmp_path / "run" / "report").iterdir()) == sorted(p.name for p in written)


def test_figures_show_their_data(tmp_path: Path) -> None:
    """A plot that ignored its data would not change with it."""
    first = build_report(write_run(tmp_path / "a"))
    second = build_report(write_run(tmp_path / "b", steps=20, evaluated=False))
    changed = {path.stem: path.read_bytes() for path in second[:-1]}
    assert set(changed) == {"loss", "throughput", "optimization"}
    for path in first:
        if path.stem in changed:
            assert path.read_bytes() != changed[path.stem], path.name


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = [path.read_bytes() for path in build_report(run, tmp_path / "a")]
    assert first == [path.read_bytes() for path in build_report(run, tmp_path / "b")]


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = read_page(build_report(write_run(tmp_path / HOSTILE.replace("/", "_")))[-1])
    assert len(page.sources) == 2 * len(ALL_FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object", "embed", "a", "form"} & set(page.tags)
    assert page.tags.count("img") == len(ALL_FIGURES)
    styles = "".join(page.text)
    assert "url(" not in styles
    assert "@import" not in styles


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    path = build_report(write_run(tmp_path / "<b>run&co"))[-1]
    assert "<script" not in path.read_text(encoding="utf-8")
    text = "".join(read_page(path).text)
    assert "<script>alert(1)</script>" in text
    assert "<b>run&co" in text


def test_summary_states_the_numbers(tmp_path: Path) -> None:
    facts = facts_of(build_report(write_run(tmp_path / "run"))[-1])
    assert facts["Final training loss"] == ("4.0000", "nats per token, step 40")
    assert facts["Best validation loss"] == ("4.5000", "nats per token, step 40")
    assert facts["Unigram entropy"][0] == "6.5432"
    assert facts["Tokens seen"][0] == "40.0k"
    # Each step counts once, so the median over steps 1..40 of 2000 + step is 2020.5.
    assert facts["Throughput"][0] == "2.02k tok/s"
    assert facts["MFU"][0] == "n/a"
    assert facts["Peak memory"][0] == "1.0 GB"
    # (30 steps) + (15 steps from 26 on), half a second each.
    assert facts["Time in training"] == ("22s", "resumed 1 time")
    assert facts["Steps"] == ("40/40", "1 skipped")
    assert facts["World"][0] == "2"
    assert facts["Sequence degree"][0] == "2"
    assert facts["Sequence length"][0] == "4,096"
    assert facts["Held-out perplexity"] == ("23.46", "12,345 tokens")
    assert facts["Bits per byte"][0] == "1.234"
    assert facts["Needle retrieval"] == ("50.0%", "multiple choice, chance 10.0%, 60 samples")


def facts_of(page: Path) -> dict[str, tuple[str, str]]:
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)(?:<small>(.*?)</small>)?</dd>", page.read_text(encoding="utf-8"))
    return {name: (value, remark) for name, value, remark in found}


def test_shapes_are_those_of_the_trained_model(tmp_path: Path) -> None:
    """Bug: for a run that started from a Hugging Face folder the page showed the schema's default shapes.

    Fix: shapes come from the newest checkpoint; without one and without shapes in the config they are unknown.
    Strategy: a config that names a folder, before and after the first checkpoints.
    """
    run = write_run(tmp_path / "run", evaluated=False)
    (run / "config.yaml").write_text("model: {from_hf: somewhere}\nengine: {kind: torch}\n")
    assert facts_of(build_report(run)[-1])["Model"] == ("n/a", "n/a layers, width n/a, n/a heads")
    for step, layers in ((5, 3), (40, 7)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.json").write_text(
            json.dumps({"family": "qwen2", "num_layers": layers, "hidden_size": 4096, "num_heads": 32})
        )
    assert facts_of(build_report(run)[-1])["Model"] == ("qwen2", "7 layers, width 4,096, 32 heads")


def test_only_deepspeed_has_a_zero_stage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", evaluated=False)
    for section, shown in (("{kind: torch, zero: 1}", "torch"), ("{kind: deepspeed, zero: 3}", "deepspeed, ZeRO 3")):
        (run / "config.yaml").write_text(f"engine: {section}\n")
        assert facts_of(build_report(run)[-1])["Engine"][0] == shown


def test_one_logged_step_is_enough(tmp_path: Path) -> None:
    written = build_report(write_run(tmp_path / "run", steps=1, evaluated=False))
    assert {path.stem for path in written} == {"loss", "throughput", "optimization", "index"}
    assert "n/a" in written[-1].read_text(encoding="utf-8")


def test_running_median_ignores_single_spikes_and_keeps_the_length() -> None:
    values = [1.0, 1.0, 1.0, 99.0, 1.0, 1.0, 1.0]
    assert running_median(values) == [1.0] * 7
    assert running_median([3.0, 1.0, 2.0], window=3) == [2.0, 2.0, 1.5]
    assert running_median([]) == []


def test_command_prints_where_files_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run", evaluated=False), tmp_path / "elsewhere"
    assert main(["report", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(out / name) for name in ("loss.png", "throughput.png", "optimization.png", "index.html")]
    assert not (run / "report").exists()


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["report", str(tmp_path / "none")], "no run folder at", capsys)
    assert list(tmp_path.iterdir()) == []


def test_empty_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert_refused(["report", str(tmp_path)], "holds no training step yet", capsys)
    assert not (tmp_path / "report").exists()


def test_foreign_evaluation_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "eval" / "needle.json").write_text("{")
    assert_refused(["report", str(run)], "needle.json is not a result of `longctx eval`", capsys)
    assert not (run / "report").exists()


def test_unwritable_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", evaluated=False)
    (tmp_path / "file").touch()
    assert_refused(["report", str(run), "--out", str(tmp_path / "file")], "cannot write the report to", capsys)


def assert_refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert sentence in printed
    assert printed.count("\n") == 1
