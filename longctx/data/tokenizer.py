"""Tokenizers read from local files: SentencePiece ``.model`` and Hugging Face ``tokenizer.json``, behind one class."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

from longctx.errors import DataError, first_line

_FILES = ("tokenizer.model", "tokenizer.json")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "<end_of_text>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "<|startoftext|>")
_SPACE_MARK = "\u2581"


class _Backend(Protocol):
    """What a tokenizer library offers, without special tokens being added or recognised in the text."""

    vocab_size: int
    eos_id: int | None
    bos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """One tokenizer file.

    ``encode`` adds no special token and treats the spelling of a special token inside a text as ordinary text;
    ``decode`` drops special tokens. ``eos_id`` ends every document of a corpus; ``vocab_size`` is one more than the
    largest id; ``fingerprint`` is the SHA-256 of the file's bytes in hexadecimal.
    """

    def __init__(self, path: Path, backend: _Backend, fingerprint: str, eos_id: int) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.vocab_size: int = backend.vocab_size
        self.eos_id = eos_id
        self.bos_id: int | None = backend.bos_id
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self._backend.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids)

    @property
    def files(self) -> list[Path]:
        """The tokenizer file and the settings beside it: what has to be copied to take the tokenizer along."""
        beside = (self.path.parent / name for name in _COMPANIONS)
        return [self.path, *(file for file in beside if file.is_file())]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer file, or the ``tokenizer.model`` or ``tokenizer.json`` of a folder.

    Raises :class:`DataError` when there is none, when it cannot be read, or when it has no end-of-document token.
    """
    file = find_tokenizer_file(Path(path))
    content = _read(file)
    if file.suffix == ".json":
        backend: _Backend = _HuggingFace(file, content)
    else:
        backend = _SentencePiece(file, content)
    if backend.eos_id is None:
        raise DataError(
            f"tokenizer {file} names no end-of-document token; set eos_token in tokenizer_config.json beside it"
        )
    return Tokenizer(file, backend, _fingerprint(content), backend.eos_id)


def fingerprint_of(path: str | Path) -> str:
    """The ``fingerprint`` of a tokenizer that is not needed itself. Raises :class:`DataError` if it cannot be read."""
    return _fingerprint(_read(find_tokenizer_file(Path(path))))


def find_tokenizer_file(path: Path) -> Path:
    """The tokenizer file that ``path`` (a file or a folder) stands for. Raises :class:`DataError` if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"no tokenizer at {path}; give a tokenizer.model, a tokenizer.json or a folder holding one")
    for name in _FILES:
        if (path / name).is_file():
            return path / name
    raise DataError(f"folder {path} holds neither tokenizer.model nor tokenizer.json")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read tokenizer {file}: {error.strerror}") from None


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _SentencePiece:
    def __init__(self, file: Path, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model: Any = SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise DataError(f"{file} is not a SentencePiece model; give a .model file or a tokenizer.json") from None
        self.vocab_size = int(self._model.get_piece_size())
        self.eos_id = _or_none(self._model.eos_id())
        self.bos_id = _or_none(self._model.bos_id())
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = mark if all(self._model.is_byte(i) for i in mark) else None

    def encode(self, text: str) -> list[int]:
        # SentencePiece writes a space as U+2581; that character itself would come back as a space: use bytes.
        if self._mark_ids is None or _SPACE_MARK not in text:
            return list(self._model.encode(text))
        ids: list[int] = []
        for part in re.split(f"({_SPACE_MARK})", text):
            ids += self._mark_ids if part == _SPACE_MARK else self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


class _HuggingFace:
    def __init__(self, file: Path, content: bytes) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._model: Any = Library.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is not a Hugging Face tokenizer.json: {first_line(error)}") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_id = _special_id(file, "eos_token", _EOS_NAMES, vocabulary)
        self.bos_id = _special_id(file, "bos_token", _BOS_NAMES, vocabulary)

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids, skip_special_tokens=True))


def _special_id(file: Path, key: str, usual: tuple[str, ...], vocabulary: dict[str, int]) -> int | None:
    """Id of a special token: named in a settings file beside ``file``, else the first usual name in the vocabulary."""
    for name in _COMPANIONS:
        token = _read_settings(file.parent / name).get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            if token not in vocabulary:
                raise DataError(f"{key} {token!r} in {file.parent / name} is not in the vocabulary of {file}")
            return vocabulary[token]
    return next((vocabulary[token] for token in usual if token in vocabulary), None)


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {first_line(error)}") from None
    return settings if isinstance(settings, dict) else {}


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None
