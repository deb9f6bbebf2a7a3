"""The order of the rooms and law 10, enforced on the source; each rule is shown to catch a planted fault."""

import ast
from collections.abc import Callable
from pathlib import Path

import house_rules as rules
import pytest

ROOT = Path(__file__).parents[2]
Rule = Callable[[str, str], list[str]]


def modules() -> dict[str, str]:
    """Every module of longctx: dotted name and source."""
    found = {}
    for file in sorted((ROOT / "longctx").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file.read_text(encoding="utf-8")
    return found


SOURCES = {name: source for name, source in modules().items() if name != "longctx"}


def faults(rule: Rule) -> list[str]:
    return [fault for name, source in SOURCES.items() for fault in rule(name, source)]


@pytest.mark.parametrize("rule", [rules.wrong_imports, rules.unsafe_code, rules.communication, rules.heavy_imports])
def test_the_house_keeps_the_rule(rule: Rule) -> None:
    assert len(SOURCES) > 40
    assert faults(rule) == []


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (rules.wrong_imports, "longctx.config.x", "import longctx.train.loop"),
        (rules.wrong_imports, "longctx.model.x", "from longctx.data.tokenizer import Tokenizer"),
        (rules.wrong_imports, "longctx.data.x", "from longctx.model.decoder import CausalLM"),
        (rules.wrong_imports, "longctx.sequence.x", "def f():\n    from longctx.attention import attention"),
        (rules.wrong_imports, "longctx.checkpoint.x", "from longctx.train.trainer import Trainer"),
        (rules.wrong_imports, "longctx.train.x", "from longctx.report.html import page"),
        (rules.wrong_imports, "longctx.data.x", "from . import corpus"),
        (rules.unsafe_code, "longctx.x", "import pickle"),
        (rules.unsafe_code, "longctx.x", "def f():\n    from joblib import load"),
        (rules.unsafe_code, "longctx.x", "import torch\ntorch.load('x')"),
        (rules.unsafe_code, "longctx.x", "from torch import load"),
        (rules.unsafe_code, "longctx.x", "import yaml\nyaml.unsafe_load('x')"),
        (rules.unsafe_code, "longctx.x", "eval('1')"),
        (rules.unsafe_code, "longctx.x", "run = exec"),
        (rules.unsafe_code, "longctx.x", "AutoModel.from_pretrained(p, trust_remote_code=True)"),
        (rules.unsafe_code, "longctx.x", "options = {'trust_remote_code': True}"),
        (rules.unsafe_code, "longctx.x", "np.load(p, allow_pickle=flag)"),
        (rules.unsafe_code, "longctx.x", "dist.all_gather_object(out, x)"),
        (rules.unsafe_code, "longctx.x", "from mpi4py import MPI\nMPI.COMM_WORLD.bcast(x)"),
        (rules.unsafe_code, "longctx.x", "subprocess.run(c, shell=True)"),
        (rules.communication, "longctx.model.x", "import torch.distributed as dist"),
        (rules.communication, "longctx.model.x", "from torch import distributed"),
        (rules.communication, "longctx.mixers.x", "from torch.distributed import all_reduce"),
        (rules.communication, "longctx.sequence.layout", "import torch\ntorch.distributed.barrier()"),
        (rules.heavy_imports, "longctx.config.x", "def f():\n    import torch"),
        (rules.heavy_imports, "longctx.cli.x", "import torch"),
        (rules.heavy_imports, "longctx.cli.x", "from pydantic import BaseModel"),
    ],
)
def test_a_planted_fault_is_found(rule: Rule, module: str, source: str) -> None:
    assert len(rule(module, source)) == 1


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (rules.wrong_imports, "longctx.train.x", "from longctx.model.decoder import CausalLM"),
        (rules.unsafe_code, "longctx.x", "model.eval()\nre.compile('x')\ntorch.compile(model)"),
        (rules.unsafe_code, "longctx.x", "np.load(p, allow_pickle=False)"),
        (rules.unsafe_code, "longctx.x", "from mpi4py import MPI\nMPI.COMM_WORLD.Bcast(x)"),
        (rules.unsafe_code, "longctx.x", "yaml.safe_load(text)"),
        (rules.communication, "longctx.sequence.collectives.ring", "import torch.distributed as dist"),
        (rules.heavy_imports, "longctx.cli.x", "import argparse\ndef run():\n    import torch"),
    ],
)
def test_good_code_passes(rule: Rule, module: str, source: str) -> None:
    assert rule(module, source) == []


def test_an_unknown_room_is_noticed() -> None:
    with pytest.raises(KeyError, match="no room"):
        rules.place("longctx.attic.box")


def test_files_are_short() -> None:
    files = [file for folder in ("longctx", "tests", "tools") for file in (ROOT / folder).rglob("*.py")]
    long = {str(file): lines for file in files if (lines := file.read_text().count("\n")) > rules.MAX_LINES}
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    assert [name for name, source in SOURCES.items() if not ast.get_docstring(ast.parse(source))] == []


def test_the_package_is_typed() -> None:
    assert (ROOT / "longctx" / "py.typed").is_file()
