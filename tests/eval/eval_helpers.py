"""A small real corpus and a small random model in a Hugging Face folder."""

import random
from dataclasses import dataclass
from pathlib import Path

from longctx.config.schema import Model
from longctx.data.build import Request, build_corpus
from longctx.data.processes import open_team
from longctx.data.shards import Options
from longctx.data.train_tokenizer import train_sentencepiece
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf

WORDS = "def class return self import value index token for while None True print range list"


@dataclass(frozen=True)
class Built:
    """Where the corpus, its tokenizer and the model lie; ``shape`` is the model's."""

    corpus: Path
    tokenizer: Path
    model: Path
    shape: Model


def write_texts(folder: Path) -> Path:
    """Forty Python-like files of very different lengths."""
    folder.mkdir()
    draw = random.Random(7)
    for number in range(40):
        lines = [
            " " * draw.randrange(0, 9, 4) + " ".join(draw.choices(WORDS.split(), k=6)) for _ in range(10 + 12 * number)
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return folder


def build(folder: Path) -> Built:
    """Tokenizer, corpus and model below ``folder``."""
    texts = write_texts(folder / "texts")
    contents = [file.read_text() for file in sorted(texts.iterdir())]
    tokenizer = train_sentencepiece(contents, folder / "tokenizer", 400).tokenizer
    with open_team() as team:
        assert team is not None
        request = Request([texts], folder / "tokenizer", folder / "corpus", Options(holdout=0.25))
        assert build_corpus(request, team) is not None
    shape = Model(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        max_position_embeddings=512, init_std=0.3,
    )  # fmt: skip
    save_hf(CausalLM(shape, seed=1), shape, folder / "model", tokenizer_dir=folder / "tokenizer")
    return Built(folder / "corpus", folder / "tokenizer", folder / "model", shape)
