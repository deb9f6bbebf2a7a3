"""Input files as documents: jsonl, parquet and plain text, alone or in folders.

The input is planned once (which files, in which order, cut into which units of work) from names and sizes only, so
the plan is the same however many workers read it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from longctx.data.readers import READERS, RawDocument, count_row_groups
from longctx.errors import DataError

Format = Literal["jsonl", "parquet", "text"]
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SMALLEST_UNIT, _LARGEST_UNIT, _USUAL_UNITS = 1 << 20, 256 << 20, 64


@dataclass(frozen=True)
class Piece:
    """Part of a file: all of a text file, a byte range of a jsonl file, a range of row groups of a parquet file."""

    path: str
    format: Format
    start: int
    stop: int


Unit = tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """Units of work in order, and the size they were cut to."""

    units: tuple[Unit, ...]
    unit_bytes: int


def plan_inputs(
    inputs: Sequence[str | Path],
    *,
    patterns: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unit_bytes: int | None = None,
) -> Plan:
    """List the files of ``inputs`` and cut them into units of about ``unit_bytes`` (default: by the total size).

    Folders are searched recursively in sorted order, hidden names left out. ``patterns`` are matched against a file's
    name and its path below the folder (default: every file), ``exclude`` also against the name of any folder between.
    Raises :class:`DataError` for a missing input, a compressed file, and when no file or no byte is found.
    """
    files = [file for item in inputs for file in _list_files(Path(item), patterns, exclude)]
    named = ", ".join(str(item) for item in inputs)
    if not files:
        wanted = f" matches {' or '.join(patterns)}" if patterns else " is found"
        raise DataError(f"no file{wanted} in {named}; check the paths, --pattern and --exclude")
    sizes = [_size(file) for file in files]
    total = sum(sizes)
    if total == 0:
        raise DataError(f"all {len(files)} files of {named} are empty; give a corpus that holds text")
    if unit_bytes is None:
        unit_bytes = min(max(total // _USUAL_UNITS, _SMALLEST_UNIT), _LARGEST_UNIT)
    pieces = [piece for file, size in zip(files, sizes, strict=True) for piece in _cut(file, size, unit_bytes)]
    return Plan(tuple(_group(pieces, unit_bytes)), unit_bytes)


def read_unit(unit: Unit, text_field: str) -> Iterator[RawDocument]:
    """Documents of a unit in order, undecoded. Raises :class:`DataError` when a file cannot be read."""
    for piece in unit:
        try:
            yield from READERS[piece.format](piece, text_field)
        except OSError as error:
            raise DataError(f"cannot read {piece.path}: {error.strerror}") from None


def _list_files(item: Path, patterns: Sequence[str], exclude: Sequence[str]) -> list[Path]:
    if item.is_file():
        return [item]
    if not item.is_dir():
        raise DataError(f"input {item} does not exist; give files or folders of text, jsonl or parquet")
    found: list[Path] = []
    for folder, subfolders, names in os.walk(item, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    relative = {file: file.relative_to(item) for file in found}
    chosen = [file for file in found if file.is_file() and _wanted(relative[file], patterns, exclude)]
    return sorted(chosen, key=lambda file: os.fsencode(relative[file].as_posix()))


def _wanted(path: Path, patterns: Sequence[str], exclude: Sequence[str]) -> bool:
    names = {path.name, path.as_posix()}
    if patterns and not any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
        return False
    return not any(fnmatchcase(name, pattern) for name in names.union(path.parts) for pattern in exclude)


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _cut(file: Path, size: int, unit_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Pieces of a file and their sizes in bytes."""
    if file.suffix.lower() in _COMPRESSED:
        raise DataError(f"{file} is compressed; decompress it first, or leave it out with --exclude '*{file.suffix}'")
    kind = _SUFFIXES.get(file.suffix.lower(), "text")
    if kind == "text" or size == 0:
        yield Piece(str(file), kind, 0, size), size
    elif kind == "jsonl":
        for start in range(0, size, unit_bytes):
            stop = min(start + unit_bytes, size)
            yield Piece(str(file), kind, start, stop), stop - start
    else:
        groups = count_row_groups(str(file))
        for group in range(groups):
            yield Piece(str(file), kind, group, group + 1), size // groups


def _group(pieces: Sequence[tuple[Piece, int]], unit_bytes: int) -> Iterator[Unit]:
    """Neighbouring pieces gathered until they reach ``unit_bytes``."""
    unit: list[Piece] = []
    filled = 0
    for piece, size in pieces:
        if unit and filled + size > unit_bytes:
            yield tuple(unit)
            unit, filled = [], 0
        unit.append(piece)
        filled += size
    if unit:
        yield tuple(unit)
