"""What the commands that measure share: a line of progress, and results in a file."""

import json
import sys
from pathlib import Path


def show_progress(name: str) -> None:
    """Say on a terminal what is being measured."""
    if sys.stderr.isatty():
        print(f"\r{name:<30}", end="\r", file=sys.stderr, flush=True)


def check_file(file: Path | None, option: str = "--json") -> None:
    """Before hours of measuring, not after."""
    from longctx.errors import ConfigError

    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ConfigError(f"{option} {file} cannot be written: give a file in a folder that exists")


def write_json(file: Path | None, values: object) -> None:
    """Write the results, if a file is wanted."""
    if file is not None:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {file}")
