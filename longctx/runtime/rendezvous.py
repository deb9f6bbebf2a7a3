"""Meeting the other processes of this start of the run, and of no earlier one.

After a rank died, torchrun restarts all processes but keeps its key-value store, and the keys of the dead start are
still in it: a process that reads a dead peer's address before the new one is written cannot connect. Restart counts
do not tell the starts apart, because agents on other nodes count differently. So the processes first agree on a name
for this start, and then use only keys below it.
"""

import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_POLL_S = 0.02
_ROOT = "longctx/start"


def name_this_start(store: Store, rank: int, world: int, timeout_s: float) -> str:
    """A name that all ``world`` running processes share and no earlier start used; collective.

    Each rank says hello with a number of its own; rank 0 answers every hello with the name, until each rank has
    acknowledged it under that name. What dead processes left behind is never acknowledged.

    Raises:
        TimeoutError: some rank did not show up in time; the message names the first.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        return _welcome(store, world, deadline)
    mine = secrets.token_hex(8)
    store.set(f"{_ROOT}/hello/{rank}", mine)
    while time.monotonic() < deadline:
        if store.check([f"{_ROOT}/welcome/{rank}"]):
            answered, name = store.get(f"{_ROOT}/welcome/{rank}").decode().split()
            if answered == mine:
                store.set(f"{_ROOT}/{name}/ack/{rank}", "")
                return name
        time.sleep(_POLL_S)
    raise TimeoutError(f"rank 0 did not answer rank {rank}")


def _welcome(store: Store, world: int, deadline: float) -> str:
    name = secrets.token_hex(8)
    missing = list(range(1, world))
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {missing[0]} did not show up")
        for rank in missing:
            if store.check([f"{_ROOT}/hello/{rank}"]):
                hello = store.get(f"{_ROOT}/hello/{rank}").decode()
                store.set(f"{_ROOT}/welcome/{rank}", f"{hello} {name}")
        time.sleep(_POLL_S)
        missing = [rank for rank in missing if not store.check([f"{_ROOT}/{name}/ack/{rank}"])]
    return name


def open_store(address: str, port: int, rank: int, world: int, hosted: bool, timeout_s: float) -> Store:
    """The key-value store of this start; ``hosted`` says that the launcher already serves one at the address."""
    limit = timedelta(seconds=timeout_s)
    host = rank == 0 and not hosted
    store = TCPStore(address, port, world, is_master=host, timeout=limit, wait_for_workers=False)
    return PrefixStore(f"{_ROOT}/{name_this_start(store, rank, world, timeout_s)}", store)
