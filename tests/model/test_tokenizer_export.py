"""transformers' AutoTokenizer, loading an export, gives the ids of our own tokenizer."""

import json
import random
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from longctx.config.schema import Model
from longctx.data import rows as data_rows
from longctx.data.tokenizer import load_tokenizer
from longctx.data.train_tokenizer import train_sentencepiece
from longctx.errors import DataError
from longctx.model import tokenizer_export
from longctx.model.decoder import CausalLM
from longctx.model.hf import save_hf

CONFIG = Model(vocab_size=600, hidden_size=16, num_layers=1, max_position_embeddings=64, eos_token_id=2)
SOURCE = Path(tokenizer_export.__file__).read_text() + Path(data_rows.__file__).read_text()


def _texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    alphabet = "aaabcdefg    \n\n\t()[]=_.é中🙂\"'0123456789XYZ"
    noise = ["".join(draw.choices(alphabet, k=draw.randrange(1, 200))) for _ in range(200)]
    spaces = ["x" + " " * n + "y" + "\n" * (n % 5) for n in range(1, 70)]
    return [SOURCE, *noise, *spaces]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(kind: str, tmp_path: Path, seed: int) -> None:
    lines = SOURCE.splitlines(keepends=True)
    chunks = ["".join(lines[i : i + 20]) for i in range(0, len(lines), 20)]
    ours = train_sentencepiece(chunks, tmp_path / "tokenizer", 600, kind=kind).tokenizer  # type: ignore[arg-type]
    save_hf(CausalLM(CONFIG), CONFIG, tmp_path / "export", tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in _texts(seed):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        # Unigram leaves the order of pieces of equal total score open.
        arrange = list if kind == "bpe" else sorted
        assert arrange(ids) == arrange(ours.encode(text)), text[:80]
        assert theirs.decode(ids) == text
    assert theirs("word")["input_ids"] == ours.encode("word")  # documents were trained on without a start token
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.bos_token_id == ours.bos_id
    exported = load_tokenizer(tmp_path / "export")
    assert exported.fingerprint == ours.fingerprint


def test_sentencepiece_like_llama(tmp_path: Path, seed: int) -> None:
    """Llama 2's own kind: a space is put before every text; settings beside the model are kept."""
    from sentencepiece import SentencePieceTrainer

    source = tmp_path / "tokenizer"
    source.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()), model_prefix=str(source / "tokenizer"), vocab_size=500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 4096, "chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    save_hf(CausalLM(CONFIG), CONFIG, tmp_path / "export", source)
    ours, theirs = load_tokenizer(source), transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in _texts(seed):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), text[:80]
        assert theirs.decode(ids) == text
    assert theirs.model_max_length == 4096
    assert theirs.chat_template == "{{ messages }}"


def test_tokenizer_json(tmp_path: Path, seed: int) -> None:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    library.train_from_iterator([SOURCE], trainer)
    (tmp_path / "tokenizer").mkdir()
    library.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    save_hf(CausalLM(CONFIG), CONFIG, tmp_path / "export", tmp_path / "tokenizer")
    ours = load_tokenizer(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in _texts(seed):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id


def test_a_model_that_normalises_is_refused(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCE.splitlines()), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"cannot be converted to tokenizer.json without changing ids"):
        save_hf(CausalLM(CONFIG), CONFIG, tmp_path / "export", tmp_path / "tokenizer.model")
    assert not (tmp_path / "export").exists()
    assert not list(tmp_path.glob(".export*"))
