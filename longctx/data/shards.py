"""Turning one unit of input into shards, and what comes of it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from longctx.data.manifest import SPLITS, Counts, Shard, Split
from longctx.data.readers import Errors, decode
from longctx.data.sources import Unit, read_unit
from longctx.data.tokenizer import Tokenizer
from longctx.errors import DataError


@dataclass(frozen=True)
class Options:
    """How documents are read and divided.

    ``holdout`` is the share of the documents, chosen by a hash of their text, that goes to the validation split.
    """

    text_field: str = "text"
    errors: Errors = "strict"
    holdout: float = 0.02


class UnitResult(BaseModel):
    """What a unit was turned into; ``digest`` covers the bytes of its documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    shards: dict[Split, Shard]
    counts: Counts
    digest: str


class Stopped(Exception):
    """The work was given up because another process failed."""


def write_unit(
    folder: Path, index: int, unit: Unit, tokenizer: Tokenizer, options: Options, between: Callable[[int], None]
) -> UnitResult:
    """Tokenize a unit into ``<split>-<index>`` shards under ``folder``; a split without documents gets no shard.

    ``between`` is called before every document with the tokens written so far. Raises :class:`DataError` for input
    that cannot be read or decoded and for a folder that cannot be written.
    """
    digest = InputDigest()
    documents = undecodable = empty = written = 0
    writers = {split: _ShardWriter(folder, f"{split}-{index:05d}", tokenizer.vocab_size) for split in SPLITS}
    try:
        for raw in read_unit(unit, options.text_field):
            between(written)
            digest.add(raw.content)
            documents += 1
            text = decode(raw, options.errors)
            if not text:
                undecodable, empty = undecodable + (text is None), empty + (text == "")
                continue
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            writers["valid" if is_held_out(text, options.holdout) else "train"].append(ids)
            written += len(ids)
        closed = {split: writer.close() for split, writer in writers.items()}
    except OSError as error:
        raise DataError(f"cannot write shard {index} into {folder}: {error.strerror}") from None
    finally:
        for writer in writers.values():
            writer.abandon()
    counts = Counts(documents=documents, undecodable=undecodable, empty=empty)
    shards = {split: shard for split, shard in closed.items() if shard is not None}
    return UnitResult(index=index, shards=shards, counts=counts, digest=digest.hex())


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation split: equal texts always fall on the same side."""
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return place < share * 2**64


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Smallest token type that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class InputDigest:
    """SHA-256 of a sequence of byte strings, their boundaries included."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, content: bytes) -> None:
        self._hash.update(len(content).to_bytes(8, "little"))
        self._hash.update(content)

    def hex(self) -> str:
        return self._hash.hexdigest()


class _ShardWriter:
    """Writes one shard document by document. The files are created with the first document."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._folder = folder
        self._name = name
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._hash = hashlib.sha256()
        self._offsets = [0]
        self._file: BinaryIO | None = None

    def append(self, ids: list[int]) -> None:
        if self._file is None:
            self._file = open(self._folder / f"{self._name}.bin", "xb")  # noqa: SIM115 - closed by close or abandon
        content = np.array(ids, dtype=self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._offsets.append(self._offsets[-1] + len(ids))

    def close(self) -> Shard | None:
        """Complete the shard; None if it has no document."""
        if self._file is None:
            return None
        self._file.close()
        offsets = np.array(self._offsets, dtype="<i8").tobytes()
        (self._folder / f"{self._name}.offsets").write_bytes(offsets)
        self._hash.update(offsets)
        tokens = self._offsets[-1]
        return Shard(
            name=self._name,
            tokens=tokens,
            documents=len(self._offsets) - 1,
            bytes=tokens * self._dtype.itemsize,
            sha256=self._hash.hexdigest(),
        )

    def abandon(self) -> None:
        """Release the file after a failure; harmless after :meth:`close`."""
        if self._file is not None:
            self._file.close()
