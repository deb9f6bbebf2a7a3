"""The processes of a benchmark: one that has all threads, and a world of ranks with one thread each.

They wait, blocked, while others measure; orders and answers are JSON lines.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from longctx.bench.post import Post
from longctx.errors import LongctxError


class Crew:
    """A single process with ``ranks`` threads and ``ranks`` processes with one thread; a context manager."""

    def __init__(self, ranks: int, inner: int) -> None:
        self._ranks, self._inner = ranks, inner
        self._stack = ExitStack()
        self._single: subprocess.Popen[str] | None = None
        self._world: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Crew":
        store = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "store"
        self._single = self._start(Post(0, 1, self._ranks, str(store), 1))
        self._world = [self._start(Post(r, self._ranks, 1, str(store), self._inner)) for r in range(self._ranks)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self._world, *([self._single] if self._single else [])]:
            if kind:
                process.kill()
            with process:  # closes its pipes, which ends it, and waits
                pass
        self._stack.close()

    def single(self, order: dict[str, Any]) -> dict[str, float]:
        """What the process with all threads answers."""
        assert self._single is not None
        return _ask([self._single], order)[0]

    def world(self, order: dict[str, Any]) -> dict[str, float]:
        """The slowest rank's seconds and the largest extra memory of a rank."""
        answers = _ask(self._world, order)
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def _start(self, post: Post) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "longctx.bench.worker"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(post.line() + "\n")
        process.stdin.flush()
        return process


def _ask(processes: "list[subprocess.Popen[str]]", order: dict[str, Any]) -> list[dict[str, float]]:
    """Raises LongctxError if a process ended; what it had to say is on stderr."""
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in processes if process.stdout is not None]
    except BrokenPipeError:
        lines = [""]
    if not all(lines):
        raise LongctxError(f"a benchmark process ended while measuring {order['contender']}; see its message above")
    return [json.loads(line) for line in lines]
