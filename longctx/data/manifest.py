"""The manifest of a corpus folder: what each shard must contain, and what the corpus was built from."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longctx.errors import DataError

VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
CONTENT = (MANIFEST, TOKENIZER_FOLDER, "*.bin", "*.offsets")

Split = Literal["train", "valid"]
SPLITS: tuple[Split, Split] = ("train", "valid")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Record):
    """Tokens in ``<name>.bin``, document offsets in ``<name>.offsets``; ``sha256`` covers the one, then the other.

    The tokens are little-endian integers of the manifest's dtype. The offsets are ``documents + 1`` little-endian
    int64: where each document starts, in tokens, and the shard's end. ``bytes`` counts the tokens' file.
    """

    name: str = Field(pattern=r"^(train|valid)-[0-9]+$")
    tokens: int = Field(gt=0)
    documents: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str


class TokenizerRecord(_Record):
    file: str = Field(pattern=r"^[^/\\]+$")
    fingerprint: str
    vocab_size: int = Field(gt=0)
    eos_id: int = Field(ge=0)


class Counts(_Record):
    """Documents met while building, and those left out."""

    documents: int = 0
    undecodable: int = 0
    empty: int = 0


class Recipe(_Record):
    """What determines a build besides the tokenizer; ``inputs`` is a digest of the documents' bytes."""

    text_field: str
    errors: str
    holdout: float
    shard_bytes: int
    inputs: str


class Manifest(_Record):
    """``manifest.json``. ``fingerprint`` is the SHA-256 of all the rest and identifies the corpus."""

    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerRecord
    recipe: Recipe
    counts: Counts
    shards: dict[Split, list[Shard]]
    fingerprint: str = ""

    def sealed(self) -> "Manifest":
        """This manifest with its fingerprint filled in."""
        return self.model_copy(update={"fingerprint": self._digest()})

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(self.model_dump(), indent=1) + "\n")

    @property
    def itemsize(self) -> int:
        """Bytes per token."""
        return int(np.dtype(self.dtype).itemsize)

    def _digest(self) -> str:
        return canonical_digest(self.model_dump(exclude={"fingerprint"}))


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json``. Raises :class:`DataError` if it is missing, altered or of another version."""
    file = folder / MANIFEST
    try:
        raw = json.loads(file.read_text())
        if isinstance(raw, dict) and raw.get("version") != VERSION:
            raise DataError(
                f"{file} has version {raw.get('version')}, this longctx reads {VERSION}; build the corpus again"
            )
        manifest = Manifest.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is no corpus (it has no {MANIFEST}); build one with `longctx data build`") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DataError(f"{file} is altered ({where}: {error.errors()[0]['msg']}); build the corpus again") from None
    except ValueError:
        raise DataError(f"{file} is no JSON; build the corpus again") from None
    if manifest._digest() != manifest.fingerprint:
        raise DataError(f"{file} is altered (its fingerprint does not match its content); build the corpus again")
    return manifest


def canonical_digest(value: Any) -> str:
    """SHA-256, in hexadecimal, of ``value`` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shard_digest(folder: Path, name: str) -> str:
    """SHA-256, in hexadecimal, of a shard's two files."""
    digest = hashlib.sha256()
    for suffix in (".bin", ".offsets"):
        with open(folder / (name + suffix), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
