"""tools/gpu_attention.py where there is no GPU: what it says, and a rehearsal on the CPU."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from longctx.attention.kernels import CPU_FLASH

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_attention.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_attention", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_attention"] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_what_it_would_measure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU here" in said and "32Ki,128Ki,512Ki" in said
    assert script.main(["--plan"]) == 0
    assert "ring of 8 virtual ranks" in capsys.readouterr().out


def test_a_wrong_kernel_and_one_that_raises_are_named(script: ModuleType) -> None:
    def wrong(*arguments: Any) -> Any:
        out, lse = CPU_FLASH.forward(*arguments)
        return out, lse + 0.01

    def raising(*arguments: Any) -> Any:
        raise RuntimeError("no such symbol\nmore")

    device = torch.device("cpu")
    checks = list(script.check(replace(CPU_FLASH, forward=wrong), torch.float32, device, rows=41))
    assert checks and not any(check.good for check in checks)
    checks = list(script.check(replace(CPU_FLASH, forward=raising), torch.float32, device, rows=41))
    assert {check.raised for check in checks} == {"no such symbol"} and not any(check.good for check in checks)
    assert "no such symbol" in script.markdown({}, checks, [])


@pytest.mark.tier2
def test_a_rehearsal_on_the_cpu_checks_and_times_every_kernel(script: ModuleType, tmp_path: Path) -> None:
    words = ["--device", "cpu", "--lengths", "1k", "--heads", "2,1,16", "--repeats", "1", "--out", str(tmp_path)]
    assert script.main(words) == 0
    found = json.loads((tmp_path / "attention.json").read_text())
    assert {check["kernel"] for check in found["checks"]} == {"cpu_flash", "naive"}
    cases = ["one call", "ring of 8", "ring of 8, packed"]
    assert [timing["case"] for timing in found["timings"]] == cases
    assert {"device", "torch", "date"} <= set(found["about"])
    assert "| cpu_flash | 1,000 | ring of 8 |" in (tmp_path / "attention.md").read_text()
