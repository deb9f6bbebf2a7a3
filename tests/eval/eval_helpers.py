"""A small real corpus and a small random model in a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from corpora import build_small

from longctx.config.schema import Model
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf


@dataclass(frozen=True)
class Built:
    """Where the corpus, its tokenizer and the model lie."""

    corpus: Path
    tokenizer: Path
    model: Path


def build(folder: Path) -> Built:
    """Tokenizer, corpus of documents long enough to evaluate on, and model below ``folder``."""
    small = build_small(folder, vocab_size=400, growth=14)
    shape = Model(
        vocab_size=400, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_position_embeddings=512,
        init_std=0.3,
    )  # fmt: skip
    save_hf(CausalLM(shape, seed=1), shape, folder / "model", tokenizer_dir=small.tokenizer)
    return Built(small.corpus, small.tokenizer, folder / "model")
