"""The command line: help without weight, errors without tracebacks, exit statuses."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import longctx
from longctx.cli import main as entry
from longctx.errors import DataError, LongctxError

sys.path.insert(0, str(Path(__file__).parents[1] / "config"))
from config_files import hf_folder, write, write_runnable

HEAVY = ("torch", "numpy", "pydantic", "transformers", "deepspeed", "yaml", "rich", "matplotlib")


def imported_by(*argv: str) -> tuple[int, set[str], str]:
    """Exit status, imported top-level packages and stdout of one command in a fresh process."""
    code = (
        "import json, sys\n"
        "from longctx.cli.main import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, set(json.loads(done.stderr.splitlines()[-1])), done.stdout


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in entry.COMMANDS)])
def test_help_is_light(argv: list[str]) -> None:
    status, packages, out = imported_by(*argv)
    assert status == 0
    assert out
    assert not packages & set(HEAVY)


def test_help_lists_every_command_with_its_line() -> None:
    _, _, out = imported_by("--help")
    words = " ".join(out.split())
    for name in entry.COMMANDS:
        assert f"{name} {entry._load(name).HELP}" in words


def test_a_command_imports_no_other_command(tmp_path: Path) -> None:
    code = "import sys; from longctx.cli.main import main; main(['check', '--schema']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout.splitlines()[-1])
    assert [name for name in loaded if name.endswith("_cmd")] == ["longctx.cli.check_cmd"]


def test_check_never_imports_torch(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    file = write_runnable(tmp_path, model={"from_hf": str(folder)})
    for argv in (["check", str(file), "--world", "2", "sequence.degree=2"], ["check", str(file), "--show"]):
        status, packages, out = imported_by(*argv)
        assert status == 0, out
        assert "pydantic" in packages
        assert not packages & {"torch", "transformers", "deepspeed", "numpy", "mpi4py"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        entry.main(["--version"])
    assert capsys.readouterr().out == f"longctx {longctx.__version__}\n"


def test_module_and_script_are_the_same_command() -> None:
    module = subprocess.run([sys.executable, "-m", "longctx", "--help"], capture_output=True, text=True, check=True)
    script = subprocess.run(
        [Path(sys.executable).with_name("longctx"), "--help"], capture_output=True, text=True, check=True
    )
    assert module.stdout == script.stdout
    assert module.stdout.startswith("usage: longctx")


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) == 2
    assert "usage: longctx" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["chekc"], ["check", "--nope"], ["check", "a", "-x=1"], ["export", "a", "--out", "b", "--family", "gpt2"]]
)
def test_misuse_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry.main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def fake_command(behave: Callable[[], int]) -> ModuleType:
    module = ModuleType("fake")
    module.HELP = "fake"  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    module.run = lambda args: behave()  # type: ignore[attr-defined]
    return module


def raising(error: BaseException) -> Callable[[], int]:
    def behave() -> int:
        raise error

    return behave


@pytest.mark.parametrize(
    ("behave", "status", "says"),
    [
        (lambda: 0, 0, ""),
        (lambda: 7, 7, ""),
        (raising(DataError("the shard x is cut short")), 2, "error: the shard x is cut short\n"),
        (raising(DataError("one\ntwo")), 2, "error: one\nerror: two\n"),
        (raising(LongctxError()), 2, "error: LongctxError\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_statuses(
    behave: Callable[[], int],
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(entry, "_load", lambda name: fake_command(behave))
    assert entry.main(["train"]) == status
    assert capsys.readouterr().err == says


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "_load", lambda name: fake_command(raising(ZeroDivisionError("ours"))))
    with pytest.raises(ZeroDivisionError):
        entry.main(["train"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "longctx", "check", "--schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_check_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_runnable(tmp_path)
    assert entry.main(["check", str(file), "sequence.degree=2", "--world", "4", "train.lr=1e-4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"ok: {file}\n")
    assert "4 = 2 data x 2 sequence" in out
    assert "256 tokens = 4 sequences, 2 micro-batches per rank" in out
    assert "2,560 tokens in 10 steps" in out
    assert "1,000 training tokens, 2.56 passes" in out
    assert "as a Hugging Face llama model" in out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.qk_norm=true", "model.family: family 'llama' cannot express qk_norm = True; set model.family to qwen3"),
        ("model.mixer=softmx", "model.mixer: 'softmx' is unknown; choices: softmax"),
        ("engine={kind: torch, zero: 3}", "engine.zero: has no effect: engine.kind torch shards nothing"),
    ],
)
def test_check_and_train_refuse_the_same(
    tmp_path: Path, override: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: check said ok where training refused: models no family can express, unknown mixers.

    Fix: both load the config through one function. Strategy: the same line from both, origin and all.
    """
    file = write_runnable(tmp_path)
    told = []
    for command in ("check", "train"):
        assert entry.main([command, str(file), override]) == 2
        told.append(capsys.readouterr().err)
    assert says in told[0]
    assert told[0] == told[1]
    assert told[0].startswith(("error: override", f"error: {file}"))


def test_what_a_hugging_face_folder_decides_is_not_shown_as_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: --show printed the schema's shapes for a model that comes from a folder, as if they were its own.

    Fix: what the folder decides is left out; the summary reads the folder. Strategy: a folder of two layers.
    """
    file = write_runnable(tmp_path, model={"from_hf": str(hf_folder(tmp_path / "hf"))})
    assert entry.main(["check", str(file), "--show", "model.rope.rope_theta=7e5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]
    assert shown.keys() == {"from_hf", "rope"}
    assert shown["rope"] == {"rope_type": "default", "rope_theta": 7e5, "partial_rotary_factor": 1.0}
    assert entry.main(["check", str(file)]) == 0
    assert "llama, 2 layers, width 32" in capsys.readouterr().out


def test_only_deepspeed_has_a_zero_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_runnable(tmp_path)
    for override, line in (("engine.kind=torch", "torch, fp32"), ("engine.zero=3", "deepspeed, ZeRO 3, fp32")):
        assert entry.main(["check", str(file), override]) == 0
        assert f"  engine     {line}\n" in capsys.readouterr().out


def test_only_softmax_is_said_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("longctx.config.check.MIXER_NAMES", ("softmax", "other"))
    assert entry.main(["check", str(write_runnable(tmp_path)), "model.mixer=other"]) == 0
    assert "  export     not possible: only softmax exports\n" in capsys.readouterr().out


def test_options_of_softmax_are_checked_and_a_bias_is_said_not_to_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: an option that a plain softmax model does not know passed the check, which built no layer.

    Fix: the mixers that are given options look at them. Strategy: one that is known, and one that is not.
    """
    file = str(write_runnable(tmp_path))
    assert entry.main(["check", file, "model.mixer_options={softmax: {kv_bias: true}}"]) == 0
    assert "not possible: no family has a place for model.mixer_options.softmax.kv_bias\n" in capsys.readouterr().out
    assert entry.main(["check", file, "model.mixer_options={softmax: {bias: true}}"]) == 2
    assert "softmax has the options: kv_bias" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["check", "a.yaml", "--world", "0"], "--world must be at least 1, not 0"),
        (["check", "a.yaml", "--world", "two"], "--world: 'two' is not a whole number"),
        (
            ["generate", "m", "--prompt", "a", "--top-p", "0.1"],
            "--top-p 0.1 has no effect at temperature 0, which is greedy; add --temperature 1",
        ),
    ],
)
def test_options_that_make_no_sense(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_check_reports_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_runnable(tmp_path)
    assert entry.main(["check", str(file), "--world", "4", "sequence.degree=3", "train.betas=[0.9, 2]"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert [line.split(": ", 3)[2] for line in streams.err.splitlines()] == ["train.betas", "sequence.degree"]
    assert streams.err.startswith("error: override 'train.betas=[0.9, 2]': train.betas: 2.0 is not in [0, 1)\n")


def test_check_names_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, "run: a\nrun: b\n")
    assert entry.main(["check", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {file}:2: run is given twice; first on line 1\n"


def test_check_refuses_what_training_would_refuse_in_an_hf_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hf_folder(tmp_path / "hf", hidden_act="gelu")
    file = write_runnable(tmp_path, model={"from_hf": str(folder)})
    assert entry.main(["check", str(file)]) == 2
    assert "hidden_act = 'gelu', which is not supported" in capsys.readouterr().err


def test_check_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["check"]) == 2
    assert capsys.readouterr().err.startswith("error: give a config file")


def test_show_prints_the_resolved_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["check", str(write_runnable(tmp_path)), "--show", "train.lr=2e-3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["lr"] == 2e-3
    assert shown["engine"]["kind"] == "deepspeed"


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"


def test_checking_a_model_that_transformers_computes_is_light(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", architectures=["MixtralForCausalLM"], model_type="mixtral")
    file = write_runnable(tmp_path, model={"from_hf": str(folder)})
    status, packages, out = imported_by("check", str(file))
    assert status == 0
    assert "MixtralForCausalLM, 2 layers, width 32, parameters as transformers' class has them" in out
    assert not packages & {"torch", "transformers"}
