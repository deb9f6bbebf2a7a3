"""Training a SentencePiece tokenizer that encodes any text without loss."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longctx.data.folders import new_folder
from longctx.data.tokenizer import Tokenizer, load_tokenizer
from longctx.errors import DataError

_CHUNK = 2000  # characters per training sentence
# Fixed, because the unigram trainer's sums depend on how its sentences are divided among threads.
_THREADS = 2


@dataclass(frozen=True)
class Trained:
    """A new tokenizer and the UTF-8 bytes it was trained on, out of those offered."""

    tokenizer: Tokenizer
    bytes_used: int
    bytes_offered: int


def train_sentencepiece(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    sample_bytes: int = 16 << 20,
    overwrite: bool = False,
) -> Trained:
    """Train a tokenizer and write ``folder/tokenizer.model``.

    Normalisation is the identity and unknown characters fall back to bytes, so decoding an encoded text gives the
    text. Runs of spaces become single tokens. At most ``sample_bytes`` of the texts are used, taken evenly. The result
    depends on nothing but the arguments. Raises :class:`DataError` for texts too few for ``vocab_size`` or an output
    folder that exists (unless ``overwrite``) or cannot be written.
    """
    with new_folder(Path(folder), overwrite=overwrite, content=("tokenizer.model", "tokenizer_config.json")) as partial:
        sample = _EvenSample(sample_bytes)
        for text in texts:
            sample.offer(text)
        model = _train(sample.chunks, vocab_size, kind)
        (partial / "tokenizer.model").write_bytes(model)
    return Trained(load_tokenizer(folder), sample.bytes_used, sample.bytes_offered)


def _train(chunks: list[str], vocab_size: int, kind: str) -> bytes:
    from sentencepiece import SentencePieceTrainer

    if not chunks:
        raise DataError("the tokenizer's input holds no text; check the paths and --pattern")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=16 * _CHUNK,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    bound = re.search(r"value <= (\d+)", message)
    if bound:
        return (
            f"the text is too small for a vocabulary of {vocab_size}; use --vocab-size {bound[1]} or less, or more text"
        )
    bound = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if bound:
        return (
            f"a vocabulary of {vocab_size} cannot hold the bytes and characters of the text; use more than {bound[1]}"
        )
    return f"SentencePiece cannot train a vocabulary of {vocab_size}: {message.strip().splitlines()[-1]}"


class _EvenSample:
    """Every n-th chunk of a stream, n doubling whenever the kept chunks exceed ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.chunks: list[str] = []
        self.bytes_used = 0
        self.bytes_offered = 0
        self._sizes: list[int] = []
        self._limit = limit
        self._stride = 1
        self._seen = 0

    def offer(self, text: str) -> None:
        for chunk in _chunks(text):
            size = len(chunk.encode())
            self.bytes_offered += size
            if self._seen % self._stride == 0:
                self.chunks.append(chunk)
                self._sizes.append(size)
                self.bytes_used += size
            self._seen += 1
            if self.bytes_used > self._limit and len(self.chunks) > 1:
                self._thin()

    def _thin(self) -> None:
        self.chunks = self.chunks[::2]
        self._sizes = self._sizes[::2]
        self.bytes_used = sum(self._sizes)
        self._stride *= 2


def _chunks(text: str) -> Iterator[str]:
    """Cut before newlines: SentencePiece drops a newline at the end of a sentence, and newlines shall be learnt."""
    start = 0
    while start < len(text):
        stop = min(start + _CHUNK, len(text))
        if stop < len(text):
            newline = text.rfind("\n", start + 1, stop)
            stop = newline if newline > 0 else stop
        yield text[start:stop]
        start = stop
