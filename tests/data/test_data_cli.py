"""``longctx data`` at the command line: what works, and one sentence for what does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from longctx.cli.main import main

BAD_USES = {
    "missing input": (["build", "nowhere", "--tokenizer", "{tok}", "--out", "out"], "input nowhere does not exist"),
    "missing tokenizer": (["build", "texts", "--tokenizer", "nowhere", "--out", "out"], "no tokenizer at nowhere"),
    "no match": (
        ["build", "texts", "--pattern", "*.py", "--tokenizer", "{tok}", "--out", "out"],
        "no file matches",
    ),
    "undecodable": (["build", "bad", "--tokenizer", "{tok}", "--out", "out"], "bad/latin.txt is not UTF-8 at byte 1"),
    "empty corpus": (["build", "empty", "--tokenizer", "{tok}", "--out", "out"], "are empty"),
    "output taken": (["build", "texts", "--tokenizer", "{tok}", "--out", "texts"], "texts holds other files"),
    "unwritable": (
        ["build", "texts", "--tokenizer", "{tok}", "--out", "bad/latin.txt/out"],
        "cannot write output folder",
    ),
    "bad size": (["build", "texts", "--tokenizer", "{tok}", "--out", "out", "--shard-size", "x"], "--shard-size: 'x'"),
    "zero size": (["build", "texts", "--tokenizer", "{tok}", "--out", "out", "--shard-size", "0"], "--shard-size must"),
    "bad holdout": (["build", "texts", "--tokenizer", "{tok}", "--out", "out", "--holdout", "2"], "--holdout is 2.0"),
    "nan holdout": (["build", "texts", "--tokenizer", "{tok}", "--out", "out", "--holdout", "nan"], "--holdout is nan"),
    "big vocabulary": (["tokenizer", "texts", "--out", "out", "--vocab-size", "1Mi"], "too small for a vocabulary"),
    "tokenizer of bad text": (["tokenizer", "bad", "--out", "out"], "bad/latin.txt is not UTF-8 at byte 1"),
    "no corpus": (["info", "texts"], "texts is no corpus"),
}


@pytest.fixture
def workplace(texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in {"bad/latin.txt": b"a\xe4", "empty/a.txt": b""}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BAD_USES)
def test_bad_use_is_one_sentence(
    name: str, workplace: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_USES[name]
    assert main(["data", *(argument.format(tok=tokenizer_folder) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(path.name for path in workplace.iterdir()) == ["bad", "empty", "texts"]


def test_bad_use_in_a_process_of_its_own(workplace: Path, tokenizer_folder: Path) -> None:
    line = [sys.executable, "-m", "longctx", "data", "build", "bad", "--tokenizer", str(tokenizer_folder), "--out", "o"]
    root = Path(__file__).parents[2]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(root)})
    assert done.returncode == 2
    assert done.stderr == (
        "error: bad/latin.txt is not UTF-8 at byte 1; convert it to UTF-8, or add --errors skip or --errors replace\n"
    )


@pytest.mark.parametrize("arguments", [[], ["build"], ["build", "x"], ["tokenizer", "x"], ["info"], ["frobnicate"]])
def test_incomplete_commands_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["data", *arguments])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("usage: longctx data")


def test_tokenizer_build_info(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "texts" / "latin.txt").write_bytes(b"\xe4")
    skip = ["--errors", "skip", "--pattern", "*.txt"]
    assert main(["data", "tokenizer", "texts", "--out", "tok", "--vocab-size", "330", *skip]) == 0
    out, err = capsys.readouterr()
    assert "330 tokens" in out and "left out 1 undecodable" in err
    build = ["data", "build", "texts", "--tokenizer", "tok", "--out", "corpus", "--holdout", "0.2", *skip]
    assert main(build) == 0
    built, _ = capsys.readouterr()
    assert built.startswith("built corpus\n") and "1 undecodable" in built
    assert main(build) == 0
    assert capsys.readouterr().out.startswith("already built: corpus\n")
    assert main(["data", "info", "corpus", "--verify"]) == 0
    info, _ = capsys.readouterr()
    assert built.splitlines()[1:] == info.splitlines()[1 : len(built.splitlines())]
    assert "sizes and SHA-256 agree" in info
    shard = workplace / "corpus" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert main(["data", "info", "corpus"]) == 2
    assert "shard train-00000" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from longctx.cli import data_cmd\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'pyarrow', 'sentencepiece'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout == "[]\n"


def test_the_data_room_never_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, longctx.data\n"
        "for m in pkgutil.iter_modules(longctx.data.__path__): importlib.import_module('longctx.data.' + m.name)\n"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout == "False\n", done.stderr
