"""Readers of one piece of an input file, one per format, and the decoding of what they read."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from longctx.errors import DataError, first_line

Errors = Literal["strict", "skip", "replace"]
_ADVICE = "convert it to UTF-8, or add --errors skip or --errors replace"


class PieceLike(Protocol):
    """Part of a file: see :class:`longctx.data.sources.Piece`."""

    @property
    def path(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class RawDocument:
    """A document before decoding.

    ``where`` names the file (and row) and ``offset`` the byte at which ``content`` starts there. With ``json_field``
    the content is one line of JSON and the text is that field.
    """

    content: bytes
    where: str
    offset: int = 0
    json_field: str | None = None


def decode(document: RawDocument, errors: Errors) -> str | None:
    """Text of a document, or None if it cannot be decoded and ``errors`` is ``skip``.

    Raises :class:`DataError` naming file and byte for undecodable bytes under ``strict``, and for broken JSON or a
    missing field under ``strict`` and ``replace``.
    """
    try:
        text = document.content.decode("utf-8", "replace" if errors == "replace" else "strict")
        if document.json_field is not None:
            text = _text_of_line(document, text)
        if errors == "replace":
            return text.encode("utf-8", "replace").decode()
        text.encode("utf-8")  # JSON can spell half of a surrogate pair, which no encoder takes
        return text
    except (UnicodeError, _BrokenLine) as error:
        if errors == "skip":
            return None
        raise DataError(_explain(document, error)) from None


class _BrokenLine(Exception):
    """A jsonl line that does not hold the text it should."""


def _text_of_line(document: RawDocument, line: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _BrokenLine("is no JSON; correct it or add --errors skip") from None
    text = record.get(document.json_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(list(record)[:8]) if isinstance(record, dict) else type(record).__name__
        raise _BrokenLine(f"has no text in field {document.json_field!r} (it has: {keys}); set --text-field")
    return text


def _explain(document: RawDocument, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{document.where} is not UTF-8 at byte {document.offset + error.start}; {_ADVICE}"
    if isinstance(error, UnicodeEncodeError):
        return f"the line at byte {document.offset} of {document.where} spells half a surrogate pair; {_ADVICE}"
    return f"the line at byte {document.offset} of {document.where} {error}"


def read_text(piece: PieceLike, text_field: str) -> Iterator[RawDocument]:
    """A whole file as one document."""
    with open(piece.path, "rb") as file:
        yield RawDocument(file.read(), piece.path)


def read_jsonl(piece: PieceLike, text_field: str) -> Iterator[RawDocument]:
    """Lines that start inside the piece's byte range; blank lines are left out."""
    with open(piece.path, "rb") as file:
        position = piece.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < piece.stop:
            line = file.readline()
            if not line:
                return
            if not line.isspace():
                yield RawDocument(line, piece.path, position, text_field)
            position += len(line)


def read_parquet(piece: PieceLike, text_field: str) -> Iterator[RawDocument]:
    """Rows of the piece's row groups; a null is an empty document."""
    import pyarrow as pa

    file = _open_parquet(piece.path)
    if text_field not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names[:8])
        raise DataError(f"{piece.path} has no column {text_field!r} (it has: {names}); set --text-field")
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    groups = list(range(piece.start, piece.stop))
    try:
        for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[text_field]):
            # As bytes: Arrow does not check that its strings are UTF-8.
            for content in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield RawDocument(content or b"", f"row {row} of {piece.path}")
                row += 1
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read column {text_field!r} of {piece.path} as text: {first_line(error)}") from None


def count_row_groups(path: str) -> int:
    """Row groups of a parquet file. Raises :class:`DataError` if it is none."""
    return int(_open_parquet(path).metadata.num_row_groups)


READERS: dict[str, Callable[[PieceLike, str], Iterator[RawDocument]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}


def _open_parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable parquet file: {first_line(error)}") from None
