"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Counts ``total`` units of work on stderr; use it as a context manager."""

    def __init__(self, what: str, total: int, *, visible: bool = True) -> None:
        self._what = what
        self._total = total
        self._finished = 0
        self._visible = visible
        self._bar = _make_bar() if visible and sys.stderr.isatty() else None
        self._task = self._bar.add_task(what, total=total, note="") if self._bar else None
        self._next_line = time.monotonic() + _INTERVAL

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, units: int = 0, note: str = "") -> None:
        """Count ``units`` more as done; ``note`` is shown beside the bar."""
        self._finished += units
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=units, note=note)
        elif self._visible and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + _INTERVAL
            print(f"{self._what}: {self._finished} of {self._total} {note}".rstrip(), file=sys.stderr, flush=True)


def _make_bar() -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
