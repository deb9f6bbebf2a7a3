"""A small tokenizer and corpora built with it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import make_texts

from longctx.data.build import Request, build_corpus
from longctx.data.processes import Alone
from longctx.data.shards import Options
from longctx.data.train_tokenizer import train_sentencepiece

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    train_sentencepiece(make_texts(400, seed=1), folder, vocab_size=400)
    return folder


@pytest.fixture
def build(tokenizer_folder: Path) -> Build:
    """Build a corpus in this process: ``build(inputs, out, **options of Request and Options)`` gives its folder."""

    def run(inputs: list[Path], out: Path, **settings: object) -> Path:
        chosen = {key: settings.pop(key) for key in ("text_field", "errors", "holdout") if key in settings}
        settings.setdefault("tokenizer", tokenizer_folder)
        build_corpus(Request(inputs=inputs, out=out, options=Options(**chosen), **settings), Alone())
        return out

    return run


@pytest.fixture
def texts_folder(tmp_path: Path) -> Path:
    """A folder tree of 60 plain text files."""
    folder = tmp_path / "texts"
    for index, text in enumerate(make_texts(60, seed=2)):
        file = folder / f"part{index % 3}" / f"{index:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture
def mpirun() -> list[str]:
    """The start of an mpirun command line; the test extra brings the program."""
    program = Path(sys.executable).with_name("mpirun")
    return [str(program) if program.exists() else "mpirun", "--allow-run-as-root", "--oversubscribe"]
