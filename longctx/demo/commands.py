"""Running longctx's own commands as a user would, showing each before it starts."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from longctx.errors import LongctxError


class DemoFailed(LongctxError):
    """A step of the demonstration did not do what it should."""


def longctx(*arguments: str | Path, shown: bool = True) -> None:
    """Run ``longctx ARGUMENTS`` and wait for it.

    Raises:
        DemoFailed: it exits with another status than 0; its own message is above.
    """
    words = [str(argument) for argument in arguments]
    if shown:
        show(["longctx", *words])
    status = subprocess.run([sys.executable, "-m", "longctx", *words], check=False).returncode
    if status:
        raise DemoFailed(f"`longctx {words[0]}` ended with status {status}; its message is above")


def show(words: Sequence[str]) -> None:
    """Print a command line the way a user would type it."""
    print(f"\n$ {shlex.join(words)}", flush=True)


def torchrun(ranks: int, restarts: int, arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start ``torchrun -m longctx ...``; its own and the workers' stderr go to ``log``."""
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "-m", "longctx"]
    show(["torchrun", *options, *arguments])
    with log.open("ab") as stderr:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *options, *arguments], stderr=stderr)
