"""One pool of worker processes for all distributed tests, started once per session.

``pool.run(function, world, *arguments)`` runs a module-level function on ranks 0..world-1 of a fresh gloo world and
returns the list of what they returned. It fails, naming the rank, when one raises, dies, or exceeds the time limit;
broken workers are replaced. ``torch.distributed`` is initialised when the function is called.
"""

import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

START_LIMIT_S = 120


class WorkerFailed(AssertionError):
    """A rank raised, died or took too long."""


class Pool:
    """Worker processes that are started when first needed and reused."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], world: int, *arguments: Any, limit_s: float = 60) -> list[Any]:
        """Call ``function(*arguments)`` on every rank of a world of ``world`` processes."""
        self._grow(world)
        workers = self._workers[:world]
        address = f"127.0.0.1:{_free_port()}"
        for rank, (_, connection) in enumerate(workers):
            connection.send((function, arguments, rank, world, address, limit_s))
        return self._collect(workers, function.__name__, limit_s)

    def close(self) -> None:
        """End all workers."""
        for process, connection in self._workers:
            connection.close()
            process.join(5)
            if process.is_alive():
                process.kill()
        self._workers = []

    def _grow(self, world: int) -> None:
        context = mp.get_context("spawn")
        fresh = []
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, list(sys.path)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
            fresh.append(ours)
        deadline = time.monotonic() + START_LIMIT_S
        for connection in fresh:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise WorkerFailed(f"a test worker did not start within {START_LIMIT_S} s")
            connection.recv()

    def _collect(self, workers: list[tuple[Any, Connection]], name: str, limit_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        ranks = {connection: rank for rank, (_, connection) in enumerate(workers)}
        deadline = time.monotonic() + limit_s
        while len(results) + len(failures) < len(workers):
            # After a first failure the others usually hang in a collective: give them a moment to report, no more.
            remaining = min(deadline - time.monotonic(), 3.0 if failures else limit_s)
            ready = wait([c for c, r in ranks.items() if r not in results and r not in failures], max(0.0, remaining))
            if not ready:
                break
            for connection in ready:
                rank = ranks[connection]  # type: ignore[index]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    failures[rank] = "the process died"
                    continue
                (results if ok else failures)[rank] = value
        if len(results) == len(workers):
            return [results[rank] for rank in range(len(workers))]
        missing = [rank for rank in range(len(workers)) if rank not in results and rank not in failures]
        self.close()
        text = "\n".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items()))
        waiting = f"\nno answer from ranks {missing} within {limit_s} s" if missing else ""
        raise WorkerFailed(f"{name} on {len(workers)} ranks:\n{text}{waiting}")


def _serve(connection: Connection, path: list[str]) -> None:
    """Worker: run what is sent until the pipe closes."""
    sys.path[:] = path
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    poison_uninitialised_memory()
    connection.send("ready")
    while True:
        try:
            function, arguments, rank, world, address, limit_s = connection.recv()
        except (EOFError, OSError):
            return
        host, port = address.split(":")
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR=host, MASTER_PORT=port
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", module="longctx")
                limit = timedelta(seconds=limit_s)
                dist.init_process_group("gloo", f"tcp://{address}", rank=rank, world_size=world, timeout=limit)
                answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            _leave()
        connection.send(answer)


def poison_uninitialised_memory() -> None:
    """Let library code that reads memory it never wrote find NaN, not last week's numbers that happen to be right."""
    import torch

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        tensor = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("longctx") and tensor.is_floating_point() and not tensor.is_meta:
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return poisoned


def _leave() -> None:
    """Forget the world, DeepSpeed's copy of it included, so that the next call may have another size."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        import deepspeed.comm.comm as deepspeed_comm
        from deepspeed.utils import groups

        deepspeed_comm.cdb = None
        for name, value in list(vars(groups).items()):
            if name.startswith("_") and name.isupper() and not callable(value):
                setattr(groups, name, {} if isinstance(value, dict) else None)
        groups.mesh_device = None
        # Ranks that sat out an earlier call must number parameters like those that did not.
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
