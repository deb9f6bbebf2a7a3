"""A small tokenizer and corpus on disk, and configs that train on them, for tests that go through the whole path."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longctx.config.schema import Config
from longctx.data.build import Request, build_corpus
from longctx.data.processes import Alone
from longctx.data.shards import Options
from longctx.data.train_tokenizer import train_sentencepiece

WORDS = "def class return self import value index token for while None True print range list yield lambda"


@dataclass(frozen=True)
class SmallCorpus:
    """Folders of a corpus of a few thousand tokens with a held-out split, and of its tokenizer."""

    corpus: Path
    tokenizer: Path

    def values(self, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        """Values of a small config; ``sections`` are merged over the defaults, one level deep."""
        values: dict[str, Any] = {
            "run": str(run),
            "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.2},
            "data": {"sources": [{"path": str(self.corpus)}]},
            "sequence": {"length": 48},
            "train": {"steps": 4, "batch": 2, "lr": 1e-2},
            "engine": {"kind": "torch"},
            "checkpoint": {"every": 2},
            "runtime": {"timeout": 60, "threads": 1},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return values

    def config(self, run: Path, **sections: dict[str, Any]) -> Config:
        return Config.model_validate(self.values(run, **sections))

    def write_config(self, file: Path, run: Path, **sections: dict[str, Any]) -> Path:
        file.write_text(yaml.safe_dump(self.values(run, **sections)), encoding="utf-8")
        return file


def build_small(folder: Path, seed: int = 7, vocab_size: int = 320, growth: int = 2) -> SmallCorpus:
    """Train a tokenizer on forty Python-like files and a corpus of them in several shards; a fifth is held out.

    File n has ``4 + growth * n`` lines.
    """
    texts = folder / "texts"
    texts.mkdir(parents=True)
    draw = random.Random(seed)
    for number in range(40):
        lines = [
            " " * draw.randrange(0, 9, 4) + " ".join(draw.choices(WORDS.split(), k=5))
            for _ in range(4 + growth * number)
        ]
        (texts / f"{number:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    contents = [file.read_text(encoding="utf-8") for file in sorted(texts.iterdir())]
    train_sentencepiece(contents, folder / "tokenizer", vocab_size)
    request = Request([texts], folder / "tokenizer", folder / "corpus", Options(holdout=0.2), shard_bytes=10_000)
    build_corpus(request, Alone())
    return SmallCorpus(folder / "corpus", folder / "tokenizer")
