"""Results on disk: one JSON file per task, complete or absent."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longctx.errors import LongctxError


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and make sure it can be written before hours of evaluation end in an error.

    Raises:
        LongctxError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".incomplete-"):
            pass
    except OSError as error:
        raise LongctxError(
            f"cannot write results to {folder}: {error.strerror}; choose another folder with --out"
        ) from None


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write ``result`` to FOLDER/TASK.json, where TASK is its ``task``; the file appears only when complete."""
    path = folder / f"{result['task']}.json"
    scratch = path.with_suffix(f".incomplete-{os.getpid()}")
    try:
        scratch.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise LongctxError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from None
    finally:
        scratch.unlink(missing_ok=True)
    return path
