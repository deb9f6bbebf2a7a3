"""A built corpus, opened read-only: one split's documents as memory-mapped tokens."""

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longctx.data.manifest import SPLITS, TOKENIZER_FOLDER, Manifest, Shard, Split, read_manifest, shard_digest
from longctx.data.tokenizer import Tokenizer, fingerprint_of
from longctx.errors import DataError

Int64Array = npt.NDArray[np.int64]


class Corpus:
    """Documents of one split, laid end to end: document ``d`` is the tokens ``offsets[d]`` to ``offsets[d + 1]``.

    Every document ends with the tokenizer's eos token. Shards are mapped when first read.
    """

    def __init__(self, folder: Path, split: Split, manifest: Manifest) -> None:
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.shards = tuple(manifest.shards[split])
        self._shard_starts: Int64Array = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)
        self._maps: dict[int, npt.NDArray[np.unsignedinteger]] = {}

    @property
    def num_tokens(self) -> int:
        return int(self._shard_starts[-1])

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary: every token id is below it."""
        return self.manifest.tokenizer.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest.tokenizer.fingerprint

    @property
    def tokenizer_folder(self) -> Path:
        """Folder holding the tokenizer that the corpus was built with."""
        return self.folder / TOKENIZER_FOLDER

    @cached_property
    def offsets(self) -> Int64Array:
        """Start of every document and the end of the last one, int64 [documents + 1], in tokens."""
        parts = [
            _read_offsets(self.folder, shard)[:-1] + start
            for shard, start in zip(self.shards, self._shard_starts[:-1], strict=True)
        ]
        return np.concatenate([*parts, self._shard_starts[-1:]])

    def tokens(self, start: int, stop: int) -> Int64Array:
        """Tokens ``start`` to ``stop`` of the split as int64; only these are read."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) of {self.num_tokens}")
        parts: list[Int64Array] = []
        index = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._shard_starts[index]), int(self._shard_starts[index + 1])
            parts.append(self._map(index)[start - base : min(stop, end) - base].astype(np.int64))
            start, index = min(stop, end), index + 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise :class:`DataError` unless ``tokenizer`` is the one that the corpus was built with."""
        self._check_fingerprint(tokenizer.path, tokenizer.fingerprint)

    def check_stored_tokenizer(self) -> None:
        """Raise :class:`DataError` unless the tokenizer stored with the corpus is the one that it was built with."""
        file = self.tokenizer_folder / self.manifest.tokenizer.file
        self._check_fingerprint(file, fingerprint_of(file))

    def _check_fingerprint(self, tokenizer: Path, fingerprint: str) -> None:
        if fingerprint != self.tokenizer_fingerprint:
            ours, theirs = self.tokenizer_fingerprint[:12], fingerprint[:12]
            raise DataError(
                f"tokenizer {tokenizer} (sha256 {theirs}) is not the one corpus {self.folder} was built with "
                f"({ours}); use {self.tokenizer_folder} or build the corpus again"
            )

    def _map(self, index: int) -> npt.NDArray[np.unsignedinteger]:
        if index not in self._maps:
            file = self.folder / f"{self.shards[index].name}.bin"
            self._maps[index] = np.memmap(file, dtype=np.dtype(self.manifest.dtype).newbyteorder("<"), mode="r")
        return self._maps[index]


def open_corpus(
    folder: str | Path, split: Split = "train", verify: bool = True, verify_part: tuple[int, int] = (0, 1)
) -> Corpus:
    """Open one split of a corpus written by ``longctx data build``.

    Sizes of all shards are always checked. With ``verify`` the shards ``rank, rank + world, ...`` are hashed as well,
    where ``verify_part`` is ``(rank, world)``: ranks that open the same corpus can share the hashing.

    Raises:
        DataError: the folder is no corpus; a shard is missing, truncated or altered (named); the tokenizer stored with
            the corpus is not the one it was built with.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise DataError(f"corpus split {split!r} is unknown; choose from {', '.join(SPLITS)}")
    manifest = read_manifest(folder)
    corpus = Corpus(folder, split, manifest)
    corpus.check_stored_tokenizer()
    for shard in corpus.shards:
        _check_size(folder, shard, manifest.itemsize)
    if verify:
        rank, world = verify_part
        for shard in corpus.shards[rank::world]:
            _check_digest(folder, shard)
    return corpus


def _check_size(folder: Path, shard: Shard, itemsize: int) -> None:
    if shard.bytes != shard.tokens * itemsize:
        raise DataError(f"shard {shard.name} of {folder} is inconsistent in its manifest; build the corpus again")
    for suffix, expected in ((".bin", shard.bytes), (".offsets", 8 * (shard.documents + 1))):
        file = folder / (shard.name + suffix)
        if not file.is_file():
            raise DataError(f"shard {shard.name} of {folder} is missing ({file.name}); build the corpus again")
        size = file.stat().st_size
        if size != expected:
            raise DataError(
                f"shard {shard.name} of {folder} is truncated or altered "
                f"({file.name} has {size} bytes, not {expected}); build the corpus again"
            )


def _check_digest(folder: Path, shard: Shard) -> None:
    try:
        digest = shard_digest(folder, shard.name)
    except OSError as error:
        raise DataError(f"shard {shard.name} of {folder} cannot be read: {error.strerror}") from None
    if digest != shard.sha256:
        raise DataError(f"shard {shard.name} of {folder} is altered (its SHA-256 differs); build the corpus again")


def _read_offsets(folder: Path, shard: Shard) -> Int64Array:
    offsets = np.fromfile(folder / f"{shard.name}.offsets", dtype="<i8").astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) <= 0).any():
        raise DataError(f"shard {shard.name} of {folder} is altered (its document offsets); build the corpus again")
    return offsets
