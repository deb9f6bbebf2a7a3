"""Where decode states lie on disk: one file of one rank, or a folder with a part of each rank.

A state is written beside its place and put there as a whole, so that a crash leaves the old one, or none.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from longctx.errors import DataError

_PART = re.compile(r"part-(\d{5})-of-(\d{5})\.safetensors")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures of the file system as one sentence.

    Raises:
        DataError: instead of them.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write the decode state {path}: {error}") from None


def check_place(path: Path) -> None:
    """Refuse a place where no state can be written, before there is one.

    Raises:
        DataError: there is a folder of something else (a file is written over), or no folder to write to.
    """
    if path.is_dir() and not (path.name and all(_PART.fullmatch(name) for name in _names(path))):
        raise DataError(f"{path} is a folder and no decode state; give another name to write one to")
    if not path.parent.is_dir():
        raise DataError(f"cannot write the decode state {path}: there is no folder {path.parent}; make it first")


def begin(path: Path, ranks: int) -> None:
    """Make room beside a place for the parts of so many ranks.

    Raises:
        DataError: see :func:`check_place`.
    """
    check_place(path)
    with writing(path):
        discard(path)
        if ranks > 1:
            _beside(path).mkdir()


def part_to_write(path: Path, rank: int, ranks: int) -> Path:
    """The file that a rank writes between :func:`begin` and :func:`finish`."""
    return _beside(path) / _part_name(rank, ranks) if ranks > 1 else _beside(path)


def finish(path: Path) -> None:
    """Put in place what all ranks have written.

    Raises:
        DataError: it cannot be.
    """
    old = path.with_name(f".removing-{path.name}")
    with writing(path):
        _remove(old)
        if path.is_dir() or (path.exists() and _beside(path).is_dir()):
            path.rename(old)  # only a file replaces a file in one step
        _beside(path).replace(path)
        _remove(old)


def discard(path: Path) -> None:
    """Remove what was written and not put in place."""
    _remove(_beside(path))


def parts_to_read(path: Path) -> list[Path]:
    """The files of all ranks, in order.

    Raises:
        DataError: it is no decode state, or parts are missing or too many.
    """
    if not path.is_dir():
        return [path]
    names = _names(path)
    found = [match for match in map(_PART.fullmatch, names) if match is not None]
    if not found:
        raise DataError(f"{path} holds no decode state; give a file or folder that save_decoded wrote")
    totals = {int(match[2]) for match in found}
    if len(totals) > 1:
        raise DataError(f"the decode state {path} holds parts of {_listed(sorted(totals))} ranks; keep those of one")
    ranks = totals.pop()
    wanted = [_part_name(rank, ranks) for rank in range(ranks)]
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"the decode state {path} lacks {_listed(missing)}; copy all of it, or write it again")
    if surplus := [name for name in names if name not in wanted]:
        raise DataError(f"the decode state {path} holds {_listed(surplus)}, which is no part of it; remove it")
    return [path / name for name in wanted]


def _part_name(rank: int, ranks: int) -> str:
    return f"part-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def _names(folder: Path) -> list[str]:
    """What lies in a folder, but for what file systems hide there."""
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def _listed(names: Sequence[object]) -> str:
    shown = " and ".join(map(str, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _beside(path: Path) -> Path:
    return path.with_name(f".writing-{path.name}")


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
