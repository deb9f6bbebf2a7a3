"""Tokenizers give texts back, agree with their libraries and refuse what they cannot read."""

import hashlib
import json
from pathlib import Path

import pytest
from data_helpers import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from longctx.data.tokenizer import fingerprint_of, load_tokenizer
from longctx.data.train_tokenizer import train_sentencepiece
from longctx.errors import DataError

ALPHABET = st.one_of(st.characters(codec="utf-8"), st.sampled_from(list(" \n\t\r\0▁⁇ab")))
TEXTS = st.one_of(st.text(ALPHABET, max_size=60), st.sampled_from(["</s>", "<0x41>", "  ", "\n\n x", "a▁▁ b▁"]))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json whose settings name the end token."""
    folder = tmp_path_factory.mktemp("hf")
    model = Library(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<start>", "<stop>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(make_texts(100, seed=3), trainer)
    model.enable_truncation(5)
    model.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "<stop>"}, "bos_token": "<start>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@settings(deadline=None)
@given(text=TEXTS)
def test_sentencepiece_gives_any_text_back(tokenizer_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@settings(deadline=None)
@given(text=TEXTS)
def test_hugging_face_gives_any_text_back(hf_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(hf_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(ids)


def test_indentation_is_one_token(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert len(tokenizer.encode(" " * 8)) == 1


def test_special_tokens_in_text_stay_text(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    assert tokenizer.decode(tokenizer.encode("a<stop></s>b")) == "a<stop></s>b"
    assert tokenizer.eos_id not in tokenizer.encode("a<stop>b")


def test_hugging_face_settings_name_the_special_tokens(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    library = Library.from_file(str(hf_folder / "tokenizer.json"))
    assert tokenizer.eos_id == library.token_to_id("<stop>")
    assert tokenizer.bos_id == library.token_to_id("<start>")
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


def test_usual_end_token_is_found_without_settings(hf_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((hf_folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(copy).eos_id == Library.from_file(str(copy)).token_to_id("</s>")


def test_fingerprint_is_that_of_the_file(tokenizer_folder: Path) -> None:
    file = tokenizer_folder / "tokenizer.model"
    tokenizer = load_tokenizer(file)
    assert tokenizer.fingerprint == fingerprint_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert tokenizer.path == file


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, kind: str) -> None:
    texts = make_texts(300, seed=4)
    first = train_sentencepiece(texts, tmp_path / "a", 340, kind=kind).tokenizer
    second = train_sentencepiece(texts, tmp_path / "b", 340, kind=kind).tokenizer
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 340


def test_sample_is_even_and_reported(tmp_path: Path) -> None:
    """The last text's rare word is learnt although only part of the texts is used."""
    texts = [f"{text} zwölfboxkämpfer" if i >= 300 else text for i, text in enumerate(make_texts(400, seed=5))]
    offered = sum(len(text.encode()) for text in texts)
    trained = train_sentencepiece(texts, tmp_path / "t", 420, sample_bytes=offered // 3)
    assert trained.bytes_offered == offered
    assert offered // 6 <= trained.bytes_used <= offered // 3
    assert len(trained.tokenizer.encode(" zwölfboxkämpfer")) < 4


@pytest.mark.parametrize(
    "vocab_size, texts, message",
    [
        (100_000, ["a few words"], "too small for a vocabulary of 100000; use --vocab-size"),
        (50, ["a few words"], "cannot hold the bytes and characters"),
        (400, [], "holds no text"),
        (400, ["", ""], "holds no text"),
    ],
)
def test_impossible_vocabularies_are_explained(tmp_path: Path, vocab_size: int, texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, tmp_path / "t", vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds neither"):
        load_tokenizer(tmp_path)
    for name, message in (("tokenizer.model", "no.* SentencePiece"), ("tokenizer.json", "no.* Hugging Face")):
        (tmp_path / name).write_bytes(b"\x80garbage")
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)


def test_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "c"}')
    with pytest.raises(DataError, match=r"'c'.* is not in the vocabulary"):
        load_tokenizer(tmp_path)
