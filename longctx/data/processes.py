"""The processes that build a corpus together: one leader and any number of helpers, over MPI or alone.

Protocol: the leader starts all helpers with one text (or with none, when there is nothing to do); helpers send reports
to the leader and at last the word that they are done; the leader ends with one verdict to every helper. Only buffers
are sent, never Python objects.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from longctx.errors import LongctxError

_REPORT, _DONE, _VERDICT = 1, 2, 3
_POLL = 0.01  # seconds
_SIZE_NAMES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANK_NAMES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Team(Protocol):
    """One process's view of the team. Process 0 leads; it may call the methods above the line, helpers those below."""

    rank: int
    size: int

    def start(self, text: str) -> None:
        """Wake the helpers with ``text``."""

    def collect(self) -> list[str]:
        """Reports that have come in since the last call."""

    def pause(self) -> None:
        """Leave the processor to others for a moment before the next :meth:`collect`."""

    def finish(self, success: bool) -> None:
        """Give the verdict and wait until every helper has stopped working. Only the first call counts."""

    # ---

    def wait_for_start(self) -> str:
        """The leader's text; empty when there is nothing to do."""

    def report(self, text: str) -> None:
        """Send a report to the leader."""

    def stopped(self) -> bool:
        """Whether the leader has given up."""

    def wait_for_verdict(self) -> bool:
        """Say that this helper is done and wait for the leader's verdict."""


class Alone:
    """A team of one."""

    rank = 0
    size = 1

    def start(self, text: str) -> None:
        pass

    def collect(self) -> list[str]:
        return []

    def pause(self) -> None:
        pass

    def finish(self, success: bool) -> None:
        pass

    def wait_for_start(self) -> str:
        raise AssertionError("a leader waits for nobody")

    def report(self, text: str) -> None:
        raise AssertionError("a leader reports to nobody")

    def stopped(self) -> bool:
        return False

    def wait_for_verdict(self) -> bool:
        raise AssertionError("a leader waits for nobody")


class MpiTeam:
    """All processes of an MPI job."""

    def __init__(self, mpi: Any) -> None:
        """``mpi`` is the module ``mpi4py.MPI``."""
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._started = False
        self._finished = False
        self._done = 0

    def start(self, text: str) -> None:
        self._started = True
        self._broadcast(text.encode())

    def collect(self) -> list[str]:
        reports: list[str] = []
        status = self._mpi.Status()
        while self._comm.Iprobe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status):
            content = bytearray(status.Get_count(self._mpi.BYTE))
            self._comm.Recv([content, self._mpi.BYTE], status.Get_source(), status.Get_tag())
            if status.Get_tag() == _DONE:
                self._done += 1
            else:
                reports.append(content.decode())
        return reports

    def pause(self) -> None:
        time.sleep(_POLL)

    def finish(self, success: bool) -> None:
        if self._finished:
            return
        self._finished = True
        if not self._started:
            self.start("")
            return
        for helper in range(1, self.size):
            self._comm.Send([bytes([success]), self._mpi.BYTE], helper, _VERDICT)
        while self._done < self.size - 1:
            self.collect()
            self.pause()

    def wait_for_start(self) -> str:
        return self._broadcast(b"").decode()

    def report(self, text: str) -> None:
        self._comm.Send([text.encode(), self._mpi.BYTE], 0, _REPORT)

    def stopped(self) -> bool:
        # Before a helper is done, the only verdict there can be is failure.
        return bool(self._comm.Iprobe(0, _VERDICT))

    def wait_for_verdict(self) -> bool:
        self._comm.Send([b"", self._mpi.BYTE], 0, _DONE)
        while not self._comm.Iprobe(0, _VERDICT):
            time.sleep(_POLL)
        verdict = bytearray(1)
        self._comm.Recv([verdict, self._mpi.BYTE], 0, _VERDICT)
        return bool(verdict[0])

    def _broadcast(self, content: bytes) -> bytes:
        size = bytearray(len(content).to_bytes(8, "little"))
        self._comm.Bcast([size, self._mpi.BYTE], 0)
        buffer = bytearray(content) if self.rank == 0 else bytearray(int.from_bytes(size, "little"))
        self._comm.Bcast([buffer, self._mpi.BYTE], 0)
        return bytes(buffer)


@contextmanager
def open_team() -> Iterator[Team | None]:
    """The team this process belongs to; None for a process that has nothing to do.

    MPI is touched only in a process that mpirun started. Where it cannot be used (mpi4py finds no MPI library, or one
    that does not belong to the mpirun), the first process works alone and the others have nothing to do. An unexpected
    error in one process ends all of them.
    """
    expected = _launched("the number of processes", _SIZE_NAMES)
    if expected <= 1:
        yield Alone()
        return
    mpi, why = _load_mpi(expected)
    if mpi is None:
        first = _launched("this process's rank", _RANK_NAMES) == 0
        if first:
            print(f"note: MPI cannot be used ({why}); one process does all the work", file=sys.stderr)
        yield Alone() if first else None
        return
    try:
        yield MpiTeam(mpi)
    except LongctxError:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        mpi.COMM_WORLD.Abort(1)


def _launched(what: str, names: tuple[str, ...]) -> int:
    """A number that the MPI launcher put into the environment; 0 if there is no launcher."""
    text = next((os.environ[name] for name in names if name in os.environ), "0")
    if not text.isdecimal():
        raise LongctxError(f"the MPI launcher gives {text!r} as {what}; start the command with mpirun, or alone")
    return int(text)


def _load_mpi(expected: int) -> tuple[Any, str]:
    """The module ``mpi4py.MPI``, or None and the reason why it is of no use."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return None, str(error).strip().partition("\n")[0]
    if MPI.COMM_WORLD.Get_size() != expected:
        return None, "mpi4py uses another MPI library than mpirun"
    return MPI, ""
