"""Output folders that appear complete or not at all."""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from longctx.errors import DataError

_OWNER = "owner.json"


def partial_folder(target: Path) -> Path:
    """Where the content of ``target`` is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def new_folder(target: Path, *, overwrite: bool, content: Sequence[str]) -> Iterator[Path]:
    """Give a folder beside ``target`` to write into; rename it to ``target`` at the end, remove it on any error.

    An existing ``target`` is replaced only with ``overwrite`` and only if every name in it matches one of the patterns
    ``content``, so that nothing but an earlier result can be lost. What a killed process left
    behind is removed by the next one.

    Raises :class:`DataError` when ``target`` exists, cannot be written or is being written by another process.
    """
    target = absolute(target)
    check_target(target, overwrite=overwrite, content=content)
    partial = partial_folder(target)
    try:
        _claim(partial)
    except OSError as error:
        raise DataError(f"cannot write output folder {target}: {error.strerror}") from None
    try:
        yield partial
        (partial / _OWNER).unlink()
        _replace(partial, target)
    except OSError as error:
        raise DataError(f"cannot write output folder {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def absolute(path: Path) -> Path:
    """``path`` without ``..`` and without a trailing dot, so that it has a name and a parent."""
    return Path(os.path.abspath(path))


def check_target(target: Path, *, overwrite: bool, content: Sequence[str]) -> None:
    """Raise :class:`DataError` if ``target`` holds something that may not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise DataError(f"output {target} exists and is not a folder; choose another --out")
    names = os.listdir(target)
    foreign = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in content))
    if foreign:
        raise DataError(f"output folder {target} holds other files, such as {foreign[0]}; choose another --out")
    if names and not overwrite:
        raise DataError(f"output folder {target} already holds another result; choose another --out or add --overwrite")


def _claim(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_dir():
        _refuse_if_in_use(partial)
        shutil.rmtree(partial)
    partial.mkdir()
    owner = {"host": socket.gethostname(), "pid": os.getpid()}
    (partial / _OWNER).write_text(json.dumps(owner))


def _refuse_if_in_use(partial: Path) -> None:
    try:
        owner = json.loads((partial / _OWNER).read_text())
        host, pid = str(owner["host"]), int(owner["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if host == socket.gethostname() and not _alive(pid):
        return
    raise DataError(
        f"{partial} is being written by process {pid} on {host}; wait for it, or remove that folder if it is gone"
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
